//! The guards that a request passes, in the order in which they run:
//!
//! 1. [`Server::parse_token`] rejects a malformed, expired or foreign IMDS token before the (possibly slow) pod lookup.
//! 2. [`Server::attribute_pod`] finds the pod, which must be the one that sent the connection's first request.
//! 3. [`Server::verify_token`] checks that the IMDS token was issued to this pod, or that its namespace requires none.
//! 4. [`Server::authorize`] gets the pod's grant.
//! 5. [`require_account_token`] rejects requests without a token if the pod's service account requires IMDSv2.
//!
//! Guards know neither routes nor responses.

use std::sync::Arc;

use http::HeaderMap;
use tokio::time::{Instant, timeout_at};

use super::{
    Server, TOKEN,
    connection_state::{CachedGrant, ConnectionState, Generations},
    imds_token::ImdsToken,
};
use crate::{
    attribute::{ATTRIBUTION_TIMEOUT, Workload},
    authorize::Grant,
    clock::UnixTime,
    refusal::{Reason, Refusal},
};

/// The part of a request that the guards need.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestContext<'a> {
    pub(super) connection: &'a ConnectionState,
    pub(super) headers: &'a HeaderMap,
    /// Deadlines count from here: the time of arrival plus the delay of the rate limit.
    pub(super) started: Instant,
}

impl Server {
    /// Guards responses that are the same for every pod. An unknown pod passes, unless its token is bound to a pod:
    /// then the pod must be known to verify the token.
    ///
    /// # Errors
    /// `ImdsTokenInvalid` or `ImdsTokenRequired`, or an attribution refusal.
    pub(super) async fn guard_any_caller(&self, context: &RequestContext<'_>) -> Result<(), Refusal> {
        let token = self.parse_token(context)?;
        let workload = match self.attributor.lookup(&context.connection.client) {
            Ok(workload) => workload,
            Err(_) if token.as_ref().is_some_and(ImdsToken::is_bound_to_pod) => self.attribute_pod(context).await?,
            Err(_) => return Ok(()),
        };
        self.verify_token(token.as_ref(), &workload)?;
        self.authorizer.grant_if_cached(&workload).map_or(Ok(()), |grant| require_account_token(&grant, context))
    }

    /// Runs guards 1 to 3. Returns the calling pod.
    ///
    /// # Errors
    /// `ImdsTokenInvalid` or `ImdsTokenRequired`, or an attribution refusal.
    pub(super) async fn guard_pod(&self, context: &RequestContext<'_>) -> Result<Workload, Refusal> {
        let token = self.parse_token(context)?;
        let workload = self.attribute_pod(context).await?;
        self.verify_token(token.as_ref(), &workload)?;
        Ok(workload)
    }

    /// Runs guards 4 and 5 for a pod that has passed [`Server::guard_pod`].
    ///
    /// # Errors
    /// The refusals of [`Server::authorize`]; `ImdsTokenRequired` if the service account requires IMDSv2.
    pub(super) async fn guard_grant(
        &self,
        workload: &Workload,
        context: &RequestContext<'_>,
        until: Instant,
    ) -> Result<Grant, Refusal> {
        let grant = self.authorize(workload, until).await?;
        require_account_token(&grant, context)?;
        Ok(grant)
    }

    /// Runs all guards. Returns the grant that the connection has cached if no generation has changed.
    ///
    /// # Errors
    /// The refusals of [`Server::guard_pod`] and [`Server::guard_grant`].
    pub(super) async fn guard_credentials(
        &self,
        context: &RequestContext<'_>,
        until: Instant,
    ) -> Result<Arc<CachedGrant>, Refusal> {
        let generations = self.generations();
        if let Some(cached) = context.connection.cached_grant(generations) {
            self.verify_token(self.parse_token(context)?.as_ref(), &cached.workload)?;
            require_account_token(&cached.grant, context)?;
            return Ok(cached);
        }
        let workload = self.guard_pod(context).await?;
        let grant = self.guard_grant(&workload, context, until).await?;
        let granted = Arc::new(CachedGrant { generations, session: self.cache.handle(&grant), workload, grant });
        // The result of a live read is valid for less time than a generation may last.
        if self.authorizer.grant_if_cached(&granted.workload).is_some() {
            context.connection.cache_grant(granted.clone());
        }
        Ok(granted)
    }

    /// Guard 1. Returns the request's token, or `None` if it has none and IMDSv2 is not required on the whole node.
    fn parse_token(&self, context: &RequestContext<'_>) -> Result<Option<ImdsToken>, Refusal> {
        let Some(token) = context.headers.get(&TOKEN) else {
            return if self.require_imdsv2.everywhere { Err(Reason::ImdsTokenRequired.into()) } else { Ok(None) };
        };
        let source = context.connection.client.source().ip();
        let token = self.imds_tokens.parse(token.as_bytes(), source, UnixTime::now());
        token.map(Some).ok_or_else(|| Reason::ImdsTokenInvalid.into())
    }

    /// Guard 2.
    pub(super) async fn attribute_pod(&self, context: &RequestContext<'_>) -> Result<Workload, Refusal> {
        let workload =
            self.attributor.attribute(&context.connection.client, context.started + ATTRIBUTION_TIMEOUT).await?;
        if !context.connection.is_bound_to(&workload) {
            return Err(Refusal::new(
                Reason::UnknownPod,
                "another pod got the source address while the connection was open",
            ));
        }
        Ok(workload)
    }

    /// Guard 3.
    fn verify_token(&self, token: Option<&ImdsToken>, workload: &Workload) -> Result<(), Refusal> {
        match token {
            Some(token) if self.imds_tokens.verify(token, workload) => Ok(()),
            Some(_) => Err(Reason::ImdsTokenInvalid.into()),
            None if self.require_imdsv2.applies_to(workload) => Err(Reason::ImdsTokenRequired.into()),
            None => Ok(()),
        }
    }

    /// Guard 4.
    ///
    /// # Errors
    /// The authorizer's refusal; `Starting` or `AccountUnavailable` if `until` passes before the service account is
    /// read.
    pub(super) async fn authorize(&self, workload: &Workload, until: Instant) -> Result<Grant, Refusal> {
        timeout_at(until, self.authorizer.authorize(workload)).await.unwrap_or_else(|_| {
            let account = workload.service_account();
            if !self.authorizer.is_ready() {
                return Err(Refusal::new(Reason::Starting, "the service accounts have not been read yet"));
            }
            Err(Refusal::new(Reason::AccountUnavailable, format!("reading service account {account} timed out")))
        })
    }

    pub(super) fn generations(&self) -> Generations {
        (self.attributor.generation(), self.authorizer.generation())
    }
}

/// Guard 5. A token that is present has passed the guards before.
fn require_account_token(grant: &Grant, context: &RequestContext<'_>) -> Result<(), Refusal> {
    let missing = grant.requires_imdsv2() && !context.headers.contains_key(&TOKEN);
    if missing { Err(Reason::ImdsTokenRequired.into()) } else { Ok(()) }
}
