//! Who is asking, whether with a right session token, and what that pod is granted. Knows no route and no answer.

use std::sync::Arc;

use http::HeaderMap;
use tokio::time::{Instant, timeout_at};

use super::{
    Server, TOKEN,
    caller::{Caller, Editions, Known},
};
use crate::{
    attribute::{ATTRIBUTION_TIMEOUT, Workload},
    authorize::Grant,
    clock::UnixTime,
    refusal::{Reason, Refusal},
};

/// One request, as far as it matters who sent it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'a> {
    pub(super) caller: &'a Caller,
    pub(super) headers: &'a HeaderMap,
    pub(super) at: Instant,
}

impl Server {
    /// For what is the same for every pod, whose caller need not be known: only a session token that is wrong, or
    /// missing where that is known to matter, stands in the way.
    pub(super) async fn anybody(&self, asked: &Asked<'_>) -> Result<(), Refusal> {
        if let Ok(workload) = self.attributor.lookup(&asked.caller.peer) {
            return self.permitted(asked, &workload);
        }
        match asked.headers.get(&TOKEN).map(|token| self.sessions.read(token.as_bytes(), UnixTime::now())) {
            // Only with the pod does it show whether that is its token.
            Some(Some(session)) if session.is_a_pods() => {
                let workload = self.attributed(asked).await?;
                self.permitted(asked, &workload)
            }
            _ => self.session(asked, None),
        }
    }

    /// A pod that is known, with a right session token or none where none is required of it.
    fn permitted(&self, asked: &Asked<'_>, workload: &Workload) -> Result<(), Refusal> {
        self.session(asked, Some(workload))?;
        self.authorizer.grant_if_cached(workload).map_or(Ok(()), |grant| suffices(&grant, asked))
    }

    /// Who is calling, with a right session token.
    pub(super) async fn caller(&self, asked: &Asked<'_>) -> Result<Workload, Refusal> {
        // What is wrong whoever is calling need not wait for who that is.
        self.session(asked, None)?;
        let workload = self.attributed(asked).await?;
        self.session(asked, Some(&workload))?;
        Ok(workload)
    }

    /// Who is calling, if it is still who it was on this connection's first request.
    pub(super) async fn attributed(&self, asked: &Asked<'_>) -> Result<Workload, Refusal> {
        let workload = self.attributor.attribute(&asked.caller.peer, asked.at + ATTRIBUTION_TIMEOUT).await?;
        if !asked.caller.is_still(&workload) {
            return Err(Refusal::new(Reason::UnknownPod, "the address changed hands while this connection was open"));
        }
        Ok(workload)
    }

    fn session(&self, asked: &Asked<'_>, workload: Option<&Workload>) -> Result<(), Refusal> {
        let Some(token) = asked.headers.get(&TOKEN) else {
            return if self.require_imdsv2.of(workload) { Err(Reason::ImdsTokenRequired.into()) } else { Ok(()) };
        };
        let session = self.sessions.read(token.as_bytes(), UnixTime::now()).ok_or(Reason::ImdsTokenInvalid)?;
        let right = self.sessions.may_belong(&session, workload, asked.caller.peer.source().ip());
        if right { Ok(()) } else { Err(Reason::ImdsTokenInvalid.into()) }
    }

    /// What a pod is granted, if this request may have it.
    pub(super) async fn grant(&self, workload: &Workload, asked: &Asked<'_>, until: Instant) -> Result<Grant, Refusal> {
        let grant = self.authorize(workload, until).await?;
        suffices(&grant, asked)?;
        Ok(grant)
    }

    pub(super) async fn authorize(&self, workload: &Workload, until: Instant) -> Result<Grant, Refusal> {
        timeout_at(until, self.authorizer.authorize(workload)).await.unwrap_or_else(|_| {
            let account = workload.service_account();
            if !self.authorizer.is_ready() {
                return Err(Refusal::new(Reason::Starting, "the service accounts were not read yet"));
            }
            Err(Refusal::new(
                Reason::AccountUnavailable,
                format!("service account {account} could not be read in time"),
            ))
        })
    }

    /// Who is calling and what it is granted: as remembered of the connection's last request, if nothing that the
    /// answer rests on has changed since.
    pub(super) async fn known(&self, asked: &Asked<'_>, until: Instant) -> Result<Arc<Known>, Refusal> {
        let editions = self.editions();
        if let Some(known) = asked.caller.known(editions) {
            self.session(asked, Some(&known.workload))?;
            suffices(&known.grant, asked)?;
            return Ok(known);
        }
        let workload = self.caller(asked).await?;
        let grant = self.grant(&workload, asked, until).await?;
        let known = Arc::new(Known { editions, session: self.cache.handle(&grant), workload, grant });
        // What a live read told holds for less long than an edition may.
        if self.authorizer.grant_if_cached(&known.workload).is_some() {
            asked.caller.remember(known.clone());
        }
        Ok(known)
    }

    pub(super) fn editions(&self) -> Editions {
        (self.attributor.generation(), self.authorizer.generation())
    }
}

/// Whether the request has a session token if what it asks for requires one.
fn suffices(grant: &Grant, asked: &Asked<'_>) -> Result<(), Refusal> {
    let lacks = grant.requires_imdsv2() && !asked.headers.contains_key(&TOKEN);
    if lacks { Err(Reason::ImdsTokenRequired.into()) } else { Ok(()) }
}
