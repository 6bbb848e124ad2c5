//! `AssumeRoleWithWebIdentity`, and the classification of its errors. The call is unsigned: kirsa has no AWS credentials
//! of its own, and no credential provider that could find any.
//!
//! S3-compatible stores return less than AWS: nothing here depends on `AssumedRoleUser`, and an unknown error code is
//! classified by its HTTP status.

#[cfg(any(test, fuzzing))]
pub(crate) mod canned;
mod interceptors;
mod reachability;

use std::{collections::HashMap, sync::Arc, time::Duration};

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
use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;
use tracing::{debug, warn};

pub use reachability::{Reachability, http_date};

use super::{
    Credential, EXCHANGE_TIMEOUT,
    credential::{CredentialParts, Secret},
    token::with_causes,
};
use crate::{
    authorize::{Grant, RoleArn},
    clock::UnixTime,
    observe::Metrics,
    refusal::{Reason, Refusal},
};

/// Default maximum session duration of a role, which every role allows:
/// <https://docs.aws.amazon.com/IAM/latest/UserGuide/id_roles_update-role-settings.html>.
const DEFAULT_MAX_SESSION: Duration = Duration::from_secs(3_600);
/// How long the fallback to that default is remembered. It expires so that raising a role's maximum needs no restart.
const FALLBACK_TTL: Duration = Duration::from_secs(3_600);
/// The same text as for the exchange timeout: which of the two expired first does not matter to an operator.
const TIMEOUT_MESSAGE: &str = "timed out after 4 s waiting for STS";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Shorter than the exchange timeout, so that the SDK gives up first and [`interceptors::PoisonOnTimeout`] runs.
const ATTEMPT_TIMEOUT: Duration = EXCHANGE_TIMEOUT.checked_sub(Duration::from_millis(200)).unwrap();
/// A session that is shorter than requested by more than this is logged.
const SHORTFALL_WARNING: Duration = Duration::from_secs(300);
/// Minimum lifetime of a session. SDKs treat a shorter one as expired.
const MIN_LIFETIME: Duration = Duration::from_secs(120);

/// Client of one STS endpoint.
#[derive(Debug, Clone)]
pub struct Sts {
    client: Client,
    /// Roles whose maximum session duration was below the requested one, and since when.
    default_duration_roles: Arc<Mutex<HashMap<RoleArn, Instant>>>,
}

impl Sts {
    /// Uses the endpoint of the region, unless `endpoint` is given.
    pub fn new(region: String, endpoint: Option<String>, metrics: Metrics) -> Self {
        Self::from_config(Self::config(region, endpoint), metrics)
    }

    fn config(region: String, endpoint: Option<String>) -> Builder {
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .operation_attempt_timeout(ATTEMPT_TIMEOUT)
            .operation_timeout(2 * EXCHANGE_TIMEOUT)
            .build();
        let mut config = Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .region(Region::new(region))
            // The cache retries, by priority.
            .retry_config(RetryConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .timeout_config(timeouts)
            .allow_no_auth();
        if let Some(endpoint) = endpoint {
            config = config.endpoint_url(endpoint);
        }
        config
    }

    fn from_config(config: Builder, metrics: Metrics) -> Self {
        let config = config
            .interceptor(interceptors::CompleteResponse)
            .interceptor(interceptors::PoisonOnTimeout)
            .interceptor(interceptors::ClockSkewMonitor { metrics });
        Self { client: Client::from_conf(config.build()), default_duration_roles: Arc::default() }
    }

    /// Exchanges the token for credentials. Falls back to the default duration if the role's maximum is below the
    /// requested one.
    ///
    /// # Errors
    /// The reasons of [`classify_error`] if the call failed; `BadStsResponse` if the response has no complete credentials;
    /// `ClockSkew` if the session is about to expire by this node's clock.
    pub async fn assume_role(&self, grant: &Grant, token: &Secret) -> Result<Credential, Refusal> {
        let requested = grant.key().duration;
        let duration =
            if self.uses_default_duration(grant.role()) { requested.min(DEFAULT_MAX_SESSION) } else { requested };
        match self.request(grant, token, duration).await {
            // STS has no error code of its own for this.
            Err(refusal) if duration > DEFAULT_MAX_SESSION && refusal.detail.contains("MaxSessionDuration") => {
                warn!(
                    role_arn = %grant.role(),
                    requested_seconds = duration.as_secs(),
                    granted_seconds = DEFAULT_MAX_SESSION.as_secs(),
                    "the role's maximum session duration is below the requested one: raise it, or request less"
                );
                self.default_duration_roles().insert(grant.role().clone(), Instant::now());
                self.request(grant, token, DEFAULT_MAX_SESSION).await
            }
            result => result,
        }
    }

    fn uses_default_duration(&self, role: &RoleArn) -> bool {
        let mut roles = self.default_duration_roles();
        roles.retain(|_, since| since.elapsed() < FALLBACK_TTL);
        roles.contains_key(role)
    }

    fn default_duration_roles(&self) -> MutexGuard<'_, HashMap<RoleArn, Instant>> {
        self.default_duration_roles.lock()
    }

    async fn request(&self, grant: &Grant, token: &Secret, duration: Duration) -> Result<Credential, Refusal> {
        let key = grant.key();
        let arns = key.policy_arns.iter().map(|arn| PolicyDescriptorType::builder().arn(arn).build());
        let call = self
            .client
            .assume_role_with_web_identity()
            .role_arn(key.role.as_str())
            .role_session_name(&key.session_name)
            .web_identity_token(token.expose())
            .duration_seconds(i32::try_from(duration.as_secs()).unwrap_or(i32::MAX))
            .set_policy(key.policy.clone())
            .set_policy_arns((!key.policy_arns.is_empty()).then(|| arns.collect()));
        let requested_at = Instant::now();
        let response = call.send().await.map_err(|error| refusal_from(grant, token, &error))?;
        let bad =
            |what: &str| Refusal::new(Reason::BadStsResponse, format!("AssumeRoleWithWebIdentity of {grant}: {what}"));
        let credentials = response.credentials.ok_or_else(|| bad("the response has no credentials"))?;
        let present = |value: &str| !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_graphic());
        let (id, secret, token) =
            (&credentials.access_key_id, &credentials.secret_access_key, &credentials.session_token);
        if !(present(id) && present(secret) && present(token)) {
            return Err(bad("the response has incomplete credentials"));
        }
        let expiration = UnixTime(u64::try_from(credentials.expiration.secs()).unwrap_or(0));
        let lifetime = lifetime(grant, duration, expiration)?;
        // Moves the strings, so that no copy is left that drop would not zero.
        let parts = CredentialParts {
            access_key_id: credentials.access_key_id,
            secret_access_key: Secret::new(credentials.secret_access_key),
            session_token: Secret::new(credentials.session_token),
            account_id: key.role.account(),
            last_updated: UnixTime::now().iso8601(),
            expiration,
            issued_at: requested_at,
            expires_at: requested_at + lifetime,
        };
        Credential::new(&parts).map_err(|error| bad(&error.to_string()))
    }
}

/// Returns the remaining lifetime, to be counted by the monotonic clock. It is at most the requested duration, even if
/// this node's wall clock is wrong.
fn lifetime(grant: &Grant, requested: Duration, expiration: UnixTime) -> Result<Duration, Refusal> {
    let now = UnixTime::now();
    let left = expiration.since(now);
    if left < MIN_LIFETIME {
        return Err(Refusal::new(
            Reason::ClockSkew,
            format!(
                "STS issued a session of {grant} that expires at {}, and this node's clock is at {}",
                expiration.iso8601(),
                now.iso8601()
            ),
        ));
    }
    if left + SHORTFALL_WARNING < requested {
        warn!(
            role_arn = %grant.role(),
            requested_seconds = requested.as_secs(),
            left_seconds = left.as_secs(),
            "STS issued a shorter session than requested, or this node's clock is ahead (kirsa_sts_clock_skew_seconds)"
        );
    }
    Ok(left.min(requested))
}

fn refusal_from(grant: &Grant, token: &Secret, error: &SdkError<AssumeRoleWithWebIdentityError>) -> Refusal {
    let (reason, message) = classify_error(error);
    // A store may quote the token that it rejects.
    let parts = token.expose().split('.').filter(|part| part.len() >= 8);
    let message = parts.fold(message, |message, part| message.replace(part, "[redacted]"));
    Refusal::new(reason, format!("AssumeRoleWithWebIdentity of {grant}: {message}"))
}

/// Returns the reason of a failed call, and a message for the log.
fn classify_error(error: &SdkError<AssumeRoleWithWebIdentityError>) -> (Reason, String) {
    let (status, code, message) = match error {
        SdkError::ServiceError(context) => {
            (Some(context.raw().status().as_u16()), context.err().code(), context.err().message())
        }
        SdkError::ResponseError(context) => (Some(context.raw().status().as_u16()), None, None),
        _ => (None, None, None),
    };
    debug!(?status, code, "STS call failed");
    let reason = match error {
        SdkError::ServiceError(_) => classify_code(code, message.unwrap_or_default(), status.unwrap_or(0)),
        SdkError::ResponseError(_) if status.is_some_and(|status| status >= 500) => Reason::StsUnavailable,
        SdkError::ResponseError(_) => Reason::BadStsResponse,
        SdkError::TimeoutError(_) => Reason::ExchangeTimeout,
        _ => Reason::StsUnavailable,
    };
    let message = match error {
        SdkError::ServiceError(context) => {
            let status = status.unwrap_or(0);
            match code {
                Some(code) => format!("{status} {code}: {}", message.unwrap_or("no message")),
                None => format!("{status} without a code: {}", summarize(context.raw())),
            }
        }
        SdkError::TimeoutError(_) => TIMEOUT_MESSAGE.to_owned(),
        other => with_causes(other),
    };
    (reason, message)
}

/// Describes a response that is not an STS error, without quoting it: it may hold credentials. The SDK's own message
/// would quote parts of it.
fn summarize(response: &HttpResponse) -> String {
    let size = response.body().bytes().map_or(0, <[u8]>::len);
    let kind = response.headers().get("content-type").unwrap_or("no content type");
    let kind: String = kind.chars().filter(char::is_ascii_graphic).take(40).collect();
    format!("{size} bytes ({kind}) that are not an STS response")
}

/// Maps an error code, or else the HTTP status, to a reason:
/// <https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRoleWithWebIdentity.html#API_AssumeRoleWithWebIdentity_Errors>,
/// <https://docs.aws.amazon.com/STS/latest/APIReference/CommonErrors.html>.
fn classify_code(code: Option<&str>, message: &str, status: u16) -> Reason {
    match code.unwrap_or_default() {
        // The same code means an invalid key and a key that could not be fetched. The AWS SDKs retry the latter too:
        // https://github.com/aws/aws-sdk-go-v2/blob/main/credentials/stscreds/web_identity_provider.go
        "InvalidIdentityToken" if message.contains("verification key") => Reason::IdentityProviderUnreachable,
        // MinIO allows no clock skew, and the token is milliseconds old:
        // https://github.com/golang-jwt/jwt/blob/main/validator.go
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
            // Without an error code it is the response of a proxy or web server in front of STS.
            400..500 if code.is_none() => Reason::BadStsResponse,
            403 => Reason::AccessDenied,
            400..500 => Reason::BadStsRequest,
            // A success status with a body that cannot be parsed.
            200..300 => Reason::BadStsResponse,
            _ => Reason::StsUnavailable,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_code_is_classified_by_status() {
        let key = "Couldn't retrieve verification key from your identity provider";
        for (code, message, status, reason) in [
            (Some("InvalidIdentityToken"), key, 400, Reason::IdentityProviderUnreachable),
            (Some("InvalidIdentityToken"), "Incorrect token audience", 400, Reason::WebIdentityRefused),
            (Some("InvalidParameterValue"), "Token used before issued", 400, Reason::TokenNotYetValid),
            (None, "", 403, Reason::BadStsResponse),
            (Some("AccessDenied"), "", 403, Reason::AccessDenied),
            (Some("ExpiredTokenException"), "", 400, Reason::WebIdentityRefused),
            (Some("IDPCommunicationError"), "", 400, Reason::IdentityProviderUnreachable),
            (Some("Throttling"), "", 400, Reason::StsThrottled),
            (Some("InvalidParameterValue"), "", 400, Reason::BadStsRequest),
            (Some("XYZ"), "", 403, Reason::AccessDenied),
            (Some("XYZ"), "", 500, Reason::StsUnavailable),
            (None, "", 429, Reason::StsThrottled),
            (None, "", 404, Reason::BadStsResponse),
            (None, "", 200, Reason::BadStsResponse),
        ] {
            assert_eq!(classify_code(code, message, status), reason, "{code:?} {message} {status}");
        }
    }
}
