//! Fourth stage: [`Grant`] → [`Credential`]: a token of the pod's own service account, exchanged at STS.
//!
//! The token is bound to the pod, minted, exchanged and dropped: never stored, never logged. Knows no HTTP server and
//! no cache.

pub mod claims;
pub mod credential;
pub mod json;
#[cfg(test)]
pub(crate) mod script;
pub mod sts;
pub mod token;

use std::{future::Future, pin::Pin, time::Duration};

use tokio::time::{Instant, timeout_at};
use tracing::info;

pub use credential::Credential;

use crate::{
    authorise::Grant,
    observe::{Metrics, Outcome, Step},
    refusal::{Reason, Refusal},
};
use claims::Claims;
use sts::Sts;
use token::TokenSource;

/// Token and STS together: the longest that Go's SDKs wait is 5 s.
pub const DEADLINE: Duration = Duration::from_secs(4);

/// Issues credentials. One method, so that what is built on it can be tested without Kubernetes and AWS.
pub trait Issuer: Send + Sync + 'static {
    fn issue<'a>(&'a self, grant: &'a Grant) -> Pin<Box<dyn Future<Output = Result<Credential, Refusal>> + Send + 'a>>;
}

/// The real way.
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
        let until = Instant::now() + DEADLINE;
        let token = self.timed(Step::Token, until, self.tokens.token(grant)).await?;
        let credential = self.timed(Step::Sts, until, self.sts.assume(grant, &token)).await?;
        let id = Claims::of(&token).and_then(|claims| claims.id);
        audit(grant, &credential, id.as_deref().unwrap_or_default());
        Ok(credential)
    }

    async fn timed<T>(
        &self,
        step: Step,
        until: Instant,
        call: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<T, Refusal> {
        let began = Instant::now();
        let result = timeout_at(until, call).await.unwrap_or_else(|_| {
            let waiting_for = match step {
                Step::Token => "the API server's TokenRequest",
                Step::Sts => "STS",
            };
            Err(Refusal::new(Reason::ExchangeTimeout, format!("still waiting for {waiting_for} after 4 s in all")))
        });
        self.metrics.exchange(step, Outcome::of(&result), began.elapsed());
        result
    }
}

impl Issuer for Exchange {
    fn issue<'a>(&'a self, grant: &'a Grant) -> Pin<Box<dyn Future<Output = Result<Credential, Refusal>> + Send + 'a>> {
        Box::pin(self.run(grant))
    }
}

/// One line for each exchange: enough to find it again in the API server's audit log (jti, pod) and in CloudTrail
/// (access key id, session name), and no secret.
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
