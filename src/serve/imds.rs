//! What the metadata service answers: a function for each route.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use tokio::time::Instant;

use super::{Server, TOKEN_TTL, answer, caller::Known, identity::Asked, session_token};
use crate::{
    attribute::ATTRIBUTION_TIMEOUT,
    cache::SessionStatus,
    clock::UnixTime,
    exchange::Credential,
    intercept::ClientConn,
    refusal::{Reason, Refusal},
};

/// The role list waits this long for the exchange, since clients give each request its own second: what the list waits
/// the credentials need not. Go's SDK v2 gives up after 500 ms.
const LIST_HOLD: Duration = Duration::from_millis(350);
/// The credentials are waited for this long; Go's SDKs give up after 5 s, and some clients never.
pub(super) const CREDENTIALS_HOLD: Duration = Duration::from_secs(4);

type Answer = Result<Response<Full<Bytes>>, Refusal>;

impl Server {
    /// Never waits: SDKs give it a second at most, and some never fall back to IMDSv1.
    pub(super) fn token(&self, asked: &Asked<'_>) -> Answer {
        // As EC2 does: a token must not be had through an open reverse proxy.
        if asked.headers.contains_key("x-forwarded-for") {
            return Err(Reason::ForwardedToken.into());
        }
        let ttl = asked.headers.get(TOKEN_TTL).and_then(|ttl| ttl.to_str().ok());
        // Rust reads "+60" as a number too.
        let ttl = ttl.filter(|ttl| ttl.bytes().all(|byte| byte.is_ascii_digit())).and_then(|ttl| ttl.parse().ok());
        let ttl: u32 = ttl.filter(|ttl| session_token::TTL.contains(ttl)).ok_or(Reason::BadTtl)?;
        let workload = self.attributor.lookup(&asked.caller.peer).ok();
        let token = self.sessions.issue(workload.as_ref(), asked.caller.peer.source().ip(), ttl, UnixTime::now());
        Ok(answer::token(token, ttl))
    }

    pub(super) async fn versions(&self, asked: &Asked<'_>) -> Answer {
        self.anybody(asked).await.map(|()| answer::text("latest"))
    }

    pub(super) async fn not_found(&self, asked: &Asked<'_>) -> Answer {
        self.anybody(asked).await.and(Err(Reason::NotFound.into()))
    }

    /// Returns a value, or the listing of a folder.
    pub(super) async fn metadata(&self, asked: &Asked<'_>, path: &str) -> Answer {
        self.anybody(asked).await?;
        if let Some(value) = self.metadata.value(path) {
            return Ok(answer::text(value));
        }
        let awaited = if path.is_empty() { "dynamic" } else { path };
        let fetched = self.metadata.is_told(awaited, asked.at + ATTRIBUTION_TIMEOUT).await;
        // These folders hold more than node metadata: list them as far as they are known.
        if !matches!(path, "" | "meta-data" | "meta-data/iam") {
            told(fetched)?;
            if let Some(value) = self.metadata.value(path) {
                return Ok(answer::text(value));
            }
        }
        let entries = self.entries(asked, path).await;
        // Clients that probe for the service itself ask for `meta-data`: it is never a 404, even if empty.
        let found = path == "meta-data" || !entries.is_empty();
        if found { Ok(answer::text(entries.join("\n"))) } else { Err(Reason::NotFound.into()) }
    }

    /// Lists a folder as it is served to this pod, sorted as on EC2.
    async fn entries(&self, asked: &Asked<'_>, folder: &str) -> Vec<String> {
        let mut entries = self.metadata.entries(folder);
        match folder {
            "" => {
                let dynamic = !self.metadata.entries("dynamic").is_empty();
                entries = dynamic.then(|| "dynamic".into()).into_iter().chain(["meta-data".into()]).collect();
            }
            "meta-data" if self.may_have_role(asked).await => {
                entries.insert(entries.partition_point(|entry| entry.as_str() < "iam/"), "iam/".into());
            }
            "meta-data/iam" if self.may_have_role(asked).await => {
                entries = vec!["info".into(), "security-credentials/".into()];
            }
            _ => {}
        }
        entries
    }

    /// Returns false only for a pod that is known to get no role: EC2 lists no `iam/` without an instance profile, and
    /// programs that read all that is listed, such as cloud-init, fail as a whole where an entry is refused.
    async fn may_have_role(&self, asked: &Asked<'_>) -> bool {
        let Ok(workload) = self.attributor.lookup(&asked.caller.peer) else { return true };
        let grant = self.authorize(&workload, asked.at + LIST_HOLD).await;
        !grant.is_err_and(|refusal| matches!(refusal.reason.info().status, 403 | 404))
    }

    /// The node's, with the account of the pod's role. Programs take their region from it: whatever is wrong with that
    /// role, or with the way to it, is no reason to keep that back.
    pub(super) async fn identity_document(&self, asked: &Asked<'_>) -> Answer {
        if !self.metadata.has_identity_document() {
            self.anybody(asked).await?;
            told(self.metadata.document_is_told(asked.at + ATTRIBUTION_TIMEOUT).await)?;
            if !self.metadata.has_identity_document() {
                return Err(Reason::NotFound.into());
            }
        }
        let workload = self.caller(asked).await?;
        let grant = match self.grant(&workload, asked, asked.at + LIST_HOLD).await {
            Ok(grant) => Some(grant),
            // Of a pod that has a role, an empty account would be kept for as long as its program lives.
            Err(refusal) if matches!(refusal.reason, Reason::ImdsTokenRequired | Reason::Starting) => {
                return Err(refusal);
            }
            Err(_) => None,
        };
        let account = grant.as_ref().and_then(|grant| grant.role().account());
        let document = self.metadata.identity_document(account).ok_or(Reason::NotFound)?;
        Ok(answer::text(document))
    }

    pub(super) async fn iam_info(&self, asked: &Asked<'_>) -> Answer {
        let workload = self.caller(asked).await?;
        let grant = self.grant(&workload, asked, asked.at + ATTRIBUTION_TIMEOUT).await?;
        answer::iam_info(grant.role(), UnixTime::now()).ok_or_else(|| Reason::NotFound.into())
    }

    pub(super) async fn role_list(&self, asked: &Asked<'_>) -> Answer {
        let workload = self.caller(asked).await?;
        let grant = self.grant(&workload, asked, asked.at + ATTRIBUTION_TIMEOUT).await?;
        match self.cache.status(&grant, asked.at + LIST_HOLD).await {
            SessionStatus::Failed(refusal) => Err(refusal),
            // The name follows from the service account: nobody need wait for STS to learn it.
            SessionStatus::Ready | SessionStatus::Pending => Ok(answer::text(grant.role().alias())),
        }
    }

    pub(super) async fn credentials(&self, asked: &Asked<'_>, role: &str, extended: bool) -> Answer {
        let until = asked.at + CREDENTIALS_HOLD;
        let known = self.known(asked, until).await?;
        let grant = &known.grant;
        // The service account decides the role. Another name is not found, whether there is such a role or not.
        if !grant.role().matches_name(role) {
            return Err(Refusal::new(Reason::NotFound, format!("role {role} is not that of {grant}")));
        }
        let credential = self.credential(&asked.caller.peer, &known, until).await?;
        Ok(answer::document(if extended { credential.extended() } else { credential.document() }))
    }

    /// What a grant is worth, if its pod still has the address when that is there.
    pub(super) async fn credential(
        &self,
        peer: &ClientConn,
        known: &Known,
        until: Instant,
    ) -> Result<Arc<Credential>, Refusal> {
        let credential = match self.cache.get_cached(&known.session) {
            Some(credential) => credential,
            None => self.cache.get(&known.grant, until).await?,
        };
        // A last look: the address may have changed hands while this request was held. What else is told of the pod
        // meanwhile, such as that address, makes no other pod of it.
        if self.editions() != known.editions && self.attributor.lookup(peer)?.uid() != known.workload.uid() {
            return Err(Refusal::new(Reason::UnknownPod, format!("{} lost its address meanwhile", known.workload)));
        }
        Ok(credential)
    }
}

fn told(told: bool) -> Result<(), Refusal> {
    told.then_some(()).ok_or_else(|| Refusal::new(Reason::Starting, "the node's metadata was not read yet"))
}
