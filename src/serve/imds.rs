//! Handlers of the metadata service, one function per route.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use tokio::time::Instant;

use super::{Server, TOKEN_TTL, connection_state::CachedGrant, guards::RequestContext, imds_token, response};
use crate::{
    attribute::ATTRIBUTION_TIMEOUT,
    cache::SessionStatus,
    clock::UnixTime,
    exchange::Credential,
    intercept::ClientConn,
    refusal::{Reason, Refusal},
};

/// Maximum wait of the role list for the exchange. Clients time each request separately, so a wait here shortens the
/// wait for the credentials. The Go SDK v2 times out after 500 ms.
const LIST_HOLD: Duration = Duration::from_millis(350);
/// Maximum wait for credentials. The Go SDKs time out after 5 s; some clients never do.
pub(super) const CREDENTIALS_HOLD: Duration = Duration::from_secs(4);

type HandlerResult = Result<Response<Full<Bytes>>, Refusal>;

impl Server {
    /// Issues an IMDS token. Never waits: SDKs time out after a second at most, and some never fall back to IMDSv1.
    pub(super) fn issue_token(&self, context: &RequestContext<'_>) -> HandlerResult {
        // EC2 does the same: an open reverse proxy must not be able to get a token (SSRF).
        if context.headers.contains_key("x-forwarded-for") {
            return Err(Reason::ForwardedToken.into());
        }
        let ttl = context.headers.get(TOKEN_TTL).and_then(|ttl| ttl.to_str().ok());
        // `parse` would accept "+60".
        let ttl = ttl.filter(|ttl| ttl.bytes().all(|byte| byte.is_ascii_digit())).and_then(|ttl| ttl.parse().ok());
        let ttl: u32 = ttl.filter(|ttl| imds_token::TTL.contains(ttl)).ok_or(Reason::BadTtl)?;
        let workload = self.attributor.lookup(&context.connection.client).ok();
        let token =
            self.imds_tokens.issue(workload.as_ref(), context.connection.client.source().ip(), ttl, UnixTime::now());
        Ok(response::token(token, ttl))
    }

    pub(super) async fn versions(&self, context: &RequestContext<'_>) -> HandlerResult {
        self.guard_any_caller(context).await.map(|()| response::text("latest"))
    }

    pub(super) async fn not_found(&self, context: &RequestContext<'_>) -> HandlerResult {
        self.guard_any_caller(context).await.and(Err(Reason::NotFound.into()))
    }

    /// Returns a value, or the listing of a folder.
    pub(super) async fn metadata(&self, context: &RequestContext<'_>, path: &str) -> HandlerResult {
        self.guard_any_caller(context).await?;
        if let Some(value) = self.metadata.value(path) {
            return Ok(response::text(value));
        }
        let needed = if path.is_empty() { "dynamic" } else { path };
        let fetched = self.metadata.wait_fetched(needed, context.started + ATTRIBUTION_TIMEOUT).await;
        // These folders contain more than node metadata: list what is known of them.
        if !matches!(path, "" | "meta-data" | "meta-data/iam") {
            require_fetched(fetched)?;
            if let Some(value) = self.metadata.value(path) {
                return Ok(response::text(value));
            }
        }
        let entries = self.entries(context, path).await;
        // Clients request `meta-data` to detect the service: it is never a 404, even if empty.
        let found = path == "meta-data" || !entries.is_empty();
        if found { Ok(response::text(entries.join("\n"))) } else { Err(Reason::NotFound.into()) }
    }

    /// Lists a folder as this pod sees it, sorted as on EC2.
    async fn entries(&self, context: &RequestContext<'_>, folder: &str) -> Vec<String> {
        let mut entries = self.metadata.entries(folder);
        match folder {
            "" => {
                let dynamic = !self.metadata.entries("dynamic").is_empty();
                entries = dynamic.then(|| "dynamic".into()).into_iter().chain(["meta-data".into()]).collect();
            }
            "meta-data" if self.may_have_role(context).await => {
                entries.insert(entries.partition_point(|entry| entry.as_str() < "iam/"), "iam/".into());
            }
            "meta-data/iam" if self.may_have_role(context).await => {
                entries = vec!["info".into(), "security-credentials/".into()];
            }
            _ => {}
        }
        entries
    }

    /// Returns false only for a pod that certainly gets no role. EC2 lists no `iam/` without an instance profile, and
    /// programs that read every listed entry, such as cloud-init, fail entirely if one is refused.
    async fn may_have_role(&self, context: &RequestContext<'_>) -> bool {
        let Ok(workload) = self.attributor.lookup(&context.connection.client) else { return true };
        let grant = self.authorize(&workload, context.started + LIST_HOLD).await;
        !grant.is_err_and(|refusal| matches!(refusal.reason.info().status, 403 | 404))
    }

    /// Returns the node's identity document with the account of the pod's role. Programs read their region from it, so
    /// it is served even if the role is unusable or cannot be looked up.
    pub(super) async fn identity_document(&self, context: &RequestContext<'_>) -> HandlerResult {
        if !self.metadata.has_identity_document() {
            self.guard_any_caller(context).await?;
            require_fetched(self.metadata.wait_document_fetched(context.started + ATTRIBUTION_TIMEOUT).await)?;
            if !self.metadata.has_identity_document() {
                return Err(Reason::NotFound.into());
            }
        }
        let workload = self.guard_pod(context).await?;
        let grant = match self.guard_grant(&workload, context, context.started + LIST_HOLD).await {
            Ok(grant) => Some(grant),
            // A program would keep the empty account for its lifetime, although its pod may have a role.
            Err(refusal) if matches!(refusal.reason, Reason::ImdsTokenRequired | Reason::Starting) => {
                return Err(refusal);
            }
            Err(_) => None,
        };
        let account = grant.as_ref().and_then(|grant| grant.role().account());
        let document = self.metadata.identity_document(account).ok_or(Reason::NotFound)?;
        Ok(response::text(document))
    }

    pub(super) async fn iam_info(&self, context: &RequestContext<'_>) -> HandlerResult {
        let workload = self.guard_pod(context).await?;
        let grant = self.guard_grant(&workload, context, context.started + ATTRIBUTION_TIMEOUT).await?;
        response::iam_info(grant.role(), UnixTime::now()).ok_or_else(|| Reason::NotFound.into())
    }

    pub(super) async fn role_list(&self, context: &RequestContext<'_>) -> HandlerResult {
        let workload = self.guard_pod(context).await?;
        let grant = self.guard_grant(&workload, context, context.started + ATTRIBUTION_TIMEOUT).await?;
        match self.cache.status(&grant, context.started + LIST_HOLD).await {
            SessionStatus::Failed(refusal) => Err(refusal),
            // The name depends only on the service account: clients need not wait for STS.
            SessionStatus::Ready | SessionStatus::Pending => Ok(response::text(grant.role().alias())),
        }
    }

    pub(super) async fn credentials(&self, context: &RequestContext<'_>, role: &str, extended: bool) -> HandlerResult {
        let until = context.started + CREDENTIALS_HOLD;
        let granted = self.guard_credentials(context, until).await?;
        let grant = &granted.grant;
        // The service account determines the role. Any other name is not found, whether or not such a role exists.
        if !grant.role().matches_name(role) {
            return Err(Refusal::new(Reason::NotFound, format!("role {role} is not the role of {grant}")));
        }
        let credential = self.credential(&context.connection.client, &granted, until).await?;
        Ok(response::document(if extended { credential.extended() } else { credential.document() }))
    }

    /// Returns the grant's credential if the pod still has the source address when the credential is there.
    ///
    /// # Errors
    /// The cache's refusal; `UnknownPod` if the pod has lost the address.
    pub(super) async fn credential(
        &self,
        client: &ClientConn,
        granted: &CachedGrant,
        until: Instant,
    ) -> Result<Arc<Credential>, Refusal> {
        let credential = match self.cache.get_cached(&granted.session) {
            Some(credential) => credential,
            None => self.cache.get(&granted.grant, until).await?,
        };
        // The address may have moved to another pod while the request waited (TOCTOU). Other changes of the same pod do
        // not matter.
        if self.generations() != granted.generations && self.attributor.lookup(client)?.uid() != granted.workload.uid()
        {
            let detail = format!("{} lost its address while the request waited", granted.workload);
            return Err(Refusal::new(Reason::UnknownPod, detail));
        }
        Ok(credential)
    }
}

fn require_fetched(fetched: bool) -> Result<(), Refusal> {
    fetched.then_some(()).ok_or_else(|| Refusal::new(Reason::Starting, "the node's metadata has not been fetched yet"))
}
