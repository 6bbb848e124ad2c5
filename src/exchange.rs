//! Fourth stage: [`Grant`] → [`Credential`]. It mints a token of the pod's own service account and exchanges it at STS.
//!
//! The token is bound to the pod and lives for one exchange: it is never stored and never logged. This stage depends on
//! neither the HTTP server nor the cache.

pub mod claims;
pub mod credential;
pub mod json;
#[cfg(test)]
pub(crate) mod script;
pub mod sts;
pub mod token;

use std::{future::Future, time::Duration};

use futures::future::BoxFuture;
use tokio::time::{Instant, timeout_at};
use tracing::info;

pub use credential::Credential;

use crate::{
    authorize::Grant,
    observe::{Metrics, Outcome, Step},
    refusal::{Reason, Refusal},
};
use claims::Claims;
use sts::Sts;
use token::TokenSource;

/// Timeout of a whole exchange, TokenRequest and STS together. The AWS SDKs for Go give up after 5 s.
pub const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(4);

/// Issues credentials. Tests of later stages replace it, and need neither Kubernetes nor AWS.
pub trait Issuer: Send + Sync + 'static {
    fn issue<'a>(&'a self, grant: &'a Grant) -> BoxFuture<'a, Result<Credential, Refusal>>;
}

/// Issues credentials from a token source and STS.
#[derive(Debug)]
pub struct Exchange {
    tokens: TokenSource,
    sts: Sts,
    metrics: Metrics,
}

impl Exchange {
    pub fn new(tokens: TokenSource, sts: Sts, metrics: Metrics) -> Self {
        Self { tokens, sts, metrics }
    }

    async fn run(&self, grant: &Grant) -> Result<Credential, Refusal> {
        let deadline = Instant::now() + EXCHANGE_TIMEOUT;
        let token = self.timed(Step::Token, deadline, self.tokens.token(grant)).await?;
        let credential = self.timed(Step::Sts, deadline, self.sts.assume_role(grant, &token)).await?;
        let jti = Claims::decode_unverified(&token).and_then(|claims| claims.jti);
        audit(grant, &credential, jti.as_deref().unwrap_or_default());
        Ok(credential)
    }

    async fn timed<T>(
        &self,
        step: Step,
        deadline: Instant,
        call: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<T, Refusal> {
        let began = Instant::now();
        let result = timeout_at(deadline, call).await.unwrap_or_else(|_| {
            let waiting_for = match step {
                Step::Token => "the API server's TokenRequest",
                Step::Sts => "STS",
            };
            Err(Refusal::new(Reason::ExchangeTimeout, format!("timed out after 4 s waiting for {waiting_for}")))
        });
        self.metrics.exchange(step, Outcome::of(&result), began.elapsed());
        result
    }
}

impl Issuer for Exchange {
    fn issue<'a>(&'a self, grant: &'a Grant) -> BoxFuture<'a, Result<Credential, Refusal>> {
        Box::pin(self.run(grant))
    }
}

/// Writes one audit line per exchange, without secrets. It links the API server's audit log (jti, pod) to CloudTrail
/// (access key ID, session name).
fn audit(grant: &Grant, credential: &Credential, jti: &str) {
    let (workload, key) = (grant.workload(), grant.key());
    info!(
        target: "kirsa::audit",
        pod = workload.pod(),
        pod_uid = %workload.uid(),
        namespace = workload.namespace(),
        service_account = &*key.account.name,
        role_arn = %key.role,
        session_name = key.session_name,
        access_key_id = credential.access_key_id(),
        jti,
        expiration = credential.expiration().iso8601(),
        "credentials issued"
    );
}
