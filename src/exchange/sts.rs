//! `AssumeRoleWithWebIdentity`, and what its failures mean. The call is unsigned: kirsa has no AWS credentials of its
//! own, and no provider that could find any.
//!
//! S3-compatible stores answer less: nothing here depends on `AssumedRoleUser`, and a code that is not known is
//! classed by its status.

#[cfg(any(test, fuzzing))]
pub(crate) mod canned;
mod interceptors;
mod reachability;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aws_sdk_sts::{
    Client, Config,
    config::{
        BehaviorVersion, Builder, Region, StalledStreamProtectionConfig, http::HttpResponse, retry::RetryConfig,
        timeout::TimeoutConfig,
    },
    error::{ProvideErrorMetadata, SdkError},
    operation::assume_role_with_web_identity::AssumeRoleWithWebIdentityError,
    types::PolicyDescriptorType,
};
use tokio::time::Instant;
use tracing::{debug, warn};

pub use reachability::{Reachability, http_date};

use super::{
    Credential, DEADLINE,
    credential::{Issued, Secret},
    token::describe,
};
use crate::{
    authorise::{Grant, RoleArn},
    clock::UnixTime,
    observe::Metrics,
    refusal::{Reason, Refusal},
};

/// What every role allows (IAM User Guide, "Maximum session duration"), in seconds.
const DEFAULT_ROLE_SECONDS: u32 = 3_600;
/// Whoever follows the advice to raise it must not have to restart the agents.
const FALLBACK_TTL: Duration = Duration::from_secs(3_600);
/// In the words of the exchange's deadline: which of the two came first is nothing to an operator.
const WAITING: &str = "still waiting for STS after 4 s in all";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A little less than the exchange's own deadline, so that it is the SDK that gives up, and something can be done about
/// the connection.
const ATTEMPT: Duration = DEADLINE.checked_sub(Duration::from_millis(200)).unwrap();
/// A session that is by this much shorter than was asked for is worth an operator's attention.
const SHORTER: Duration = Duration::from_secs(300);
/// What SDKs would take for expired, or nearly so.
const SHORTEST: Duration = Duration::from_secs(120);

/// One STS endpoint.
#[derive(Debug, Clone)]
pub struct Sts {
    client: Client,
    /// Roles that did not allow as much as was asked for, and when; all allow their default.
    roles_with_default: Arc<Mutex<HashMap<RoleArn, Instant>>>,
}

impl Sts {
    /// The region's own endpoint, or the one that is given.
    pub fn new(region: String, endpoint: Option<String>, metrics: Metrics) -> Self {
        Self::of(Self::config(region, endpoint), metrics)
    }

    fn config(region: String, endpoint: Option<String>) -> Builder {
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .operation_attempt_timeout(ATTEMPT)
            .operation_timeout(2 * DEADLINE)
            .build();
        let mut config = Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .region(Region::new(region))
            // The cache retries: it knows the priority.
            .retry_config(RetryConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .timeout_config(timeouts)
            .allow_no_auth();
        if let Some(endpoint) = endpoint {
            config = config.endpoint_url(endpoint);
        }
        config
    }

    fn of(config: Builder, metrics: Metrics) -> Self {
        let config = config
            .interceptor(interceptors::CompleteResponse)
            .interceptor(interceptors::PoisonOnTimeout)
            .interceptor(interceptors::Clock { metrics });
        Self { client: Client::from_conf(config.build()), roles_with_default: Arc::default() }
    }

    /// # Errors
    /// Why STS, or what is between here and it, said no.
    pub async fn assume(&self, grant: &Grant, token: &Secret) -> Result<Credential, Refusal> {
        let asked = grant.key().duration;
        let duration = if self.uses_default_duration(grant.role()) { asked.min(DEFAULT_ROLE_SECONDS) } else { asked };
        let answer = self.request(grant, token, duration).await;
        match answer {
            // STS has no code of its own for this.
            Err(refusal) if duration > DEFAULT_ROLE_SECONDS && refusal.detail.contains("MaxSessionDuration") => {
                warn!(
                    role_arn = %grant.role(), asked_seconds = duration, granted_seconds = DEFAULT_ROLE_SECONDS,
                    "the role's maximum session duration is shorter than asked for: raise it, or ask for less"
                );
                self.default_duration_roles().insert(grant.role().clone(), Instant::now());
                self.request(grant, token, DEFAULT_ROLE_SECONDS).await
            }
            answer => answer,
        }
    }

    fn uses_default_duration(&self, role: &RoleArn) -> bool {
        let mut roles = self.default_duration_roles();
        roles.retain(|_, since| since.elapsed() < FALLBACK_TTL);
        roles.contains_key(role)
    }

    fn default_duration_roles(&self) -> MutexGuard<'_, HashMap<RoleArn, Instant>> {
        self.roles_with_default.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn request(&self, grant: &Grant, token: &Secret, duration: u32) -> Result<Credential, Refusal> {
        let key = grant.key();
        let arns = key.policy_arns.iter().map(|arn| PolicyDescriptorType::builder().arn(arn).build());
        let call = self
            .client
            .assume_role_with_web_identity()
            .role_arn(key.role.as_str())
            .role_session_name(&key.session_name)
            .web_identity_token(token.expose())
            .duration_seconds(i32::try_from(duration).unwrap_or(i32::MAX))
            .set_policy(key.policy.clone())
            .set_policy_arns((!key.policy_arns.is_empty()).then(|| arns.collect()));
        let asked_at = Instant::now();
        let answer = call.send().await.map_err(|error| refused(grant, token, &error))?;
        let bad =
            |what: &str| Refusal::new(Reason::BadStsAnswer, format!("AssumeRoleWithWebIdentity of {grant}: {what}"));
        let credentials = answer.credentials.ok_or_else(|| bad("no credentials in the answer"))?;
        let present = |value: &str| !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_graphic());
        let (id, secret, token) =
            (&credentials.access_key_id, &credentials.secret_access_key, &credentials.session_token);
        if !(present(id) && present(secret) && present(token)) {
            return Err(bad("the answer lacks a part of the credentials"));
        }
        let expiration = UnixTime(u64::try_from(credentials.expiration.secs()).unwrap_or(0));
        let lifetime = lifetime(grant, duration, expiration)?;
        // The credentials take over the strings: nothing is left to zero but what they hold.
        let issued = Issued {
            access_key_id: credentials.access_key_id,
            secret_access_key: Secret::new(credentials.secret_access_key),
            session_token: Secret::new(credentials.session_token),
            account_id: key.role.account(),
            last_updated: UnixTime::now().iso8601(),
            expiration,
            issued_at: asked_at,
            expires_at: asked_at + lifetime,
        };
        Credential::new(&issued).map_err(|error| bad(&error.to_string()))
    }
}

/// How long the session lasts, from now on by a clock that cannot be set: never longer than was asked for, whatever
/// this node's wall clock makes of the expiration.
fn lifetime(grant: &Grant, asked: u32, expiration: UnixTime) -> Result<Duration, Refusal> {
    let (now, asked) = (UnixTime::now(), Duration::from_secs(asked.into()));
    let left = expiration.since(now);
    if left < SHORTEST {
        return Err(Refusal::new(
            Reason::ClockSkew,
            format!(
                "STS issued a session of {grant} that expires {}, and this node's clock says {}",
                expiration.iso8601(),
                now.iso8601()
            ),
        ));
    }
    if left + SHORTER < asked {
        warn!(
            role_arn = %grant.role(), asked_seconds = asked.as_secs(), left_seconds = left.as_secs(),
            "STS issued a shorter session than was asked for, or this node's clock is ahead (kirsa_sts_clock_skew_seconds)"
        );
    }
    Ok(left.min(asked))
}

fn refused(grant: &Grant, token: &Secret, error: &SdkError<AssumeRoleWithWebIdentityError>) -> Refusal {
    let (reason, said) = classified(error);
    // Nothing keeps a store from quoting the token that it refuses.
    let parts = token.expose().split('.').filter(|part| part.len() >= 8);
    let said = parts.fold(said, |said, part| said.replace(part, "[redacted]"));
    Refusal::new(reason, format!("AssumeRoleWithWebIdentity of {grant}: {said}"))
}

/// What kind of no, and in whose words.
fn classified(error: &SdkError<AssumeRoleWithWebIdentityError>) -> (Reason, String) {
    let (status, code, message) = match error {
        SdkError::ServiceError(answer) => {
            (Some(answer.raw().status().as_u16()), answer.err().code(), answer.err().message())
        }
        SdkError::ResponseError(answer) => (Some(answer.raw().status().as_u16()), None, None),
        _ => (None, None, None),
    };
    debug!(?status, code, "STS refused");
    let reason = match error {
        SdkError::ServiceError(_) => classify(code, message.unwrap_or_default(), status.unwrap_or(0)),
        SdkError::ResponseError(_) if status.is_some_and(|status| status >= 500) => Reason::StsUnavailable,
        SdkError::ResponseError(_) => Reason::BadStsAnswer,
        SdkError::TimeoutError(_) => Reason::ExchangeTimeout,
        _ => Reason::StsUnavailable,
    };
    let said = match error {
        SdkError::ServiceError(answer) => {
            let status = status.unwrap_or(0);
            match code {
                Some(code) => format!("{status} {code}: {}", message.unwrap_or("no message")),
                None => format!("{status} without a code: {}", summarize(answer.raw())),
            }
        }
        SdkError::TimeoutError(_) => WAITING.to_owned(),
        other => describe(other),
    };
    (reason, said)
}

/// What is known of an answer that was not understood without quoting it: the SDK's own words have parts of it, and it
/// may hold credentials.
fn summarize(answer: &HttpResponse) -> String {
    let size = answer.body().bytes().map_or(0, <[u8]>::len);
    let kind = answer.headers().get("content-type").unwrap_or("no content type");
    let kind: String = kind.chars().filter(char::is_ascii_graphic).take(40).collect();
    format!("{size} bytes ({kind}) that are no answer of an STS")
}

/// STS API Reference, AssumeRoleWithWebIdentity, "Errors", and "Common Errors".
fn classify(code: Option<&str>, message: &str, status: u16) -> Reason {
    match code.unwrap_or_default() {
        // One code for a key that is wrong and for one that could not be had just now, which AWS's own SDKs retry
        // (aws-sdk-go-v2, credentials/stscreds/web_identity_provider.go).
        "InvalidIdentityToken" if message.contains("verification key") => Reason::IdentityProviderUnreachable,
        // MinIO's library grants the clocks no leeway, and the token is milliseconds old (golang-jwt, claims).
        _ if message.contains("used before issued") || message.contains("not valid yet") => Reason::TokenNotYetValid,
        "AccessDenied" | "AccessDeniedException" => Reason::AccessDenied,
        "InvalidIdentityToken" | "ExpiredTokenException" | "ExpiredToken" | "IDPRejectedClaim" => {
            Reason::WebIdentityRefused
        }
        "MalformedPolicyDocument" | "PackedPolicyTooLarge" => Reason::BadSessionPolicy,
        "RegionDisabledException" => Reason::RegionDisabled,
        "ValidationError" | "InvalidParameterValue" | "MissingParameter" => Reason::BadStsRequest,
        "IDPCommunicationError" => Reason::IdentityProviderUnreachable,
        "Throttling" | "ThrottlingException" | "RequestLimitExceeded" | "TooManyRequestsException" | "SlowDown" => {
            Reason::StsThrottled
        }
        "RequestTimeout" | "RequestTimeoutException" | "InternalFailure" | "InternalError" | "ServiceUnavailable" => {
            Reason::StsUnavailable
        }
        _ => match status {
            429 => Reason::StsThrottled,
            // Without any code it is no word of an STS, but of a proxy or a web server that stands before one.
            400..500 if code.is_none() => Reason::BadStsAnswer,
            403 => Reason::AccessDenied,
            400..500 => Reason::BadStsRequest,
            // What passes for an answer and cannot be read.
            200..300 => Reason::BadStsAnswer,
            _ => Reason::StsUnavailable,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_decide_and_an_unknown_one_falls_back_on_the_status() {
        let key = "Couldn't retrieve verification key from your identity provider";
        for (code, message, status, reason) in [
            (Some("InvalidIdentityToken"), key, 400, Reason::IdentityProviderUnreachable),
            (Some("InvalidIdentityToken"), "Incorrect token audience", 400, Reason::WebIdentityRefused),
            (Some("InvalidParameterValue"), "Token used before issued", 400, Reason::TokenNotYetValid),
            (None, "", 403, Reason::BadStsAnswer),
            (Some("AccessDenied"), "", 403, Reason::AccessDenied),
            (Some("ExpiredTokenException"), "", 400, Reason::WebIdentityRefused),
            (Some("IDPCommunicationError"), "", 400, Reason::IdentityProviderUnreachable),
            (Some("Throttling"), "", 400, Reason::StsThrottled),
            (Some("InvalidParameterValue"), "", 400, Reason::BadStsRequest),
            (Some("XYZ"), "", 403, Reason::AccessDenied),
            (Some("XYZ"), "", 500, Reason::StsUnavailable),
            (None, "", 429, Reason::StsThrottled),
            (None, "", 404, Reason::BadStsAnswer),
            (None, "", 200, Reason::BadStsAnswer),
        ] {
            assert_eq!(classify(code, message, status), reason, "{code:?} {message} {status}");
        }
    }
}
