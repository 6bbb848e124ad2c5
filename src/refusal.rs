//! Every way to say no, in one table: what the pod sees, what the log and the metrics say, how long it is remembered,
//! and what an operator should change. The pod learns little, the log learns all.
//!
//! Stages return a [`Refusal`]; only `serve` turns one into a response.

use std::{fmt, sync::Arc, time::Duration};

use tracing::Level;

/// What kind of no. Bounded, so that it can be a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
// For tests that go through all of them.
#[cfg_attr(test, derive(clap::ValueEnum))]
pub enum Reason {
    // The request itself.
    NotFound,
    MethodNotAllowed,
    BadRequest,
    BadTtl,
    ForwardedToken,
    SessionRequired,
    SessionInvalid,
    ContainerTokenMissing,
    TooManyRequests,
    TooManyConnections,
    // Who is calling.
    NotRedirected,
    Starting,
    UnknownPod,
    AmbiguousAddress,
    ContainerTokenRefused,
    ContainerTokenForeign,
    ReviewForbidden,
    ReviewUnavailable,
    // What the pod may have.
    NoRole,
    BadAnnotation,
    AccountUnavailable,
    // The pod's service-account token.
    TokenForbidden,
    TokenRefused,
    PodGone,
    TokenUnavailable,
    TokenFile,
    // The exchange at STS.
    AccessDenied,
    WebIdentityRefused,
    BadSessionPolicy,
    BadStsRequest,
    RegionDisabled,
    StsThrottled,
    StsUnavailable,
    IdentityProviderUnreachable,
    TokenNotYetValid,
    BadStsAnswer,
    ClockSkew,
    ExchangeTimeout,
}

/// How long a failed exchange is remembered before the next try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryPolicy {
    /// Not the outcome of an exchange.
    None,
    /// Trying again sooner cannot help: somebody has to change something.
    Fixed(Duration),
    /// May pass by itself: retried with full jitter, ever more slowly.
    Backoff,
}

/// One row of the table.
#[derive(Debug)]
pub struct ReasonInfo {
    /// The metric label and the `reason` field of the log.
    pub label: &'static str,
    /// The HTTP status that a pod gets.
    pub status: u16,
    pub retry: RetryPolicy,
    pub level: Level,
    /// What an operator should change.
    pub advice: &'static str,
}

const fn row(label: &'static str, status: u16, memory: RetryPolicy, level: Level, advice: &'static str) -> ReasonInfo {
    ReasonInfo { label, status, retry: memory, level, advice }
}

const fn seconds(n: u64) -> RetryPolicy {
    RetryPolicy::Fixed(Duration::from_secs(n))
}

impl Reason {
    /// Statuses follow what real SDKs do with them (docs/imds-requirements.md, 24 to 28): 404 ends every client at
    /// once, 403 says "denied", 503 makes them try again; 400, 401, 429 and 500 are wrong for anything that may pass.
    pub fn info(self) -> ReasonInfo {
        use RetryPolicy::{Backoff, None};
        match self {
            Self::NotFound => row("not_found", 404, None, Level::DEBUG, "no such path is served"),
            Self::MethodNotAllowed => {
                row("method", 405, None, Level::DEBUG, "only GET, HEAD and PUT /latest/api/token are served")
            }
            Self::BadRequest => row("bad_request", 400, None, Level::DEBUG, "the client speaks no plain HTTP/1.1"),
            Self::BadTtl => row(
                "bad_ttl",
                400,
                None,
                Level::DEBUG,
                "X-aws-ec2-metadata-token-ttl-seconds must be a number from 1 to 21600",
            ),
            Self::ForwardedToken => row(
                "forwarded_token",
                403,
                None,
                Level::WARN,
                "a reverse proxy in the pod forwards requests to the metadata address; IMDSv2 exists to stop that",
            ),
            Self::SessionRequired => row(
                "session_required",
                401,
                None,
                Level::INFO,
                "IMDSv2 is required here: update the SDK, or allow IMDSv1 (--require-imdsv2, \
                 --require-imdsv2-namespaces, kirsa.dev/require-imdsv2)",
            ),
            Self::SessionInvalid => row(
                "session_invalid",
                401,
                None,
                Level::INFO,
                "the IMDSv2 session token is malformed, has expired or was issued to another pod; SDKs fetch a new one",
            ),
            Self::ContainerTokenMissing => row(
                "container_token_missing",
                400,
                None,
                Level::INFO,
                "a request for container credentials needs one Authorization header, the content of the file that \
                 AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE names",
            ),
            Self::TooManyRequests => row(
                "too_many_requests",
                503,
                None,
                Level::WARN,
                "one source asks more often than it may: look at what it runs, or raise --max-requests-per-source",
            ),
            Self::TooManyConnections => row(
                "too_many_connections",
                503,
                None,
                Level::WARN,
                "one source, or all together, have as many connections open as they may: look at what runs there, or \
                 raise --max-connections-per-source, --max-connections",
            ),
            Self::NotRedirected => row(
                "not_redirected",
                403,
                None,
                Level::WARN,
                "the connection did not come through the redirect from the metadata address; ask 169.254.169.254:80. A pod \
                 that does so and is refused is routed around it, as with security groups for pods in strict mode: \
                 use POD_SECURITY_GROUP_ENFORCING_MODE=standard, or IRSA or EKS Pod Identity in that pod",
            ),
            Self::Starting => row(
                "starting",
                503,
                None,
                Level::INFO,
                "the agent has not read the pods, the service accounts or the node's metadata yet; /readyz names what is pending of the first two",
            ),
            Self::UnknownPod => row(
                "unknown_pod",
                503,
                None,
                Level::WARN,
                "no live pod of this node has the source address: a hostNetwork pod or a process of the node, a CNI \
                 that translates source addresses, a watch that lags (kirsa_watch_silence_seconds), or IPv4 in an IPv6 \
                 EKS cluster (set AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE=IPv6 in the pod)",
            ),
            Self::AmbiguousAddress => row(
                "ambiguous_address",
                503,
                None,
                Level::ERROR,
                "more than one live pod claims the source address: nothing is served to it until one of them is gone",
            ),
            Self::ContainerTokenRefused => row(
                "container_token_refused",
                400,
                None,
                Level::WARN,
                "the API server does not accept the token: it must be a projected one of --container-audience, not \
                 expired, and of a pod that there is",
            ),
            Self::ContainerTokenForeign => row(
                "container_token_foreign",
                403,
                None,
                Level::ERROR,
                "the token names another pod than the address does, or none: both must agree; find out how the token \
                 got there",
            ),
            Self::ReviewForbidden => row(
                "review_forbidden",
                503,
                None,
                Level::ERROR,
                "the agent may not create tokenreviews: apply daemonset/components/container-credentials",
            ),
            Self::ReviewUnavailable => row(
                "review_unavailable",
                503,
                None,
                Level::WARN,
                "the API server does not answer TokenReviews: check it and the way to it",
            ),
            Self::NoRole => row(
                "no_role",
                404,
                None,
                Level::INFO,
                "annotate the service account with its role ARN if the pod should have one",
            ),
            Self::BadAnnotation => row(
                "bad_annotation",
                403,
                None,
                Level::WARN,
                "correct the annotation on the service account; the next request reads it again",
            ),
            Self::AccountUnavailable => row(
                "account_unavailable",
                503,
                None,
                Level::WARN,
                "the API server does not say which role the service account has: check it and the way to it",
            ),
            Self::TokenForbidden => row(
                "token_forbidden",
                503,
                seconds(10),
                Level::ERROR,
                "the agent may not mint this token: compare its RBAC and the admission policy with daemonset/, and \
                 the audience with the one that they allow",
            ),
            Self::TokenRefused => row(
                "token_refused",
                503,
                seconds(10),
                Level::ERROR,
                "the API server refuses the TokenRequest as malformed: check the audience",
            ),
            Self::PodGone => {
                row("pod_gone", 503, seconds(5), Level::INFO, "the pod or its service account is gone; nothing to do")
            }
            Self::TokenUnavailable => row(
                "token_unavailable",
                503,
                Backoff,
                Level::WARN,
                "the API server does not answer TokenRequests: check it and the way to it",
            ),
            Self::TokenFile => row(
                "token_file",
                503,
                seconds(5),
                Level::ERROR,
                "the workload's tokenFile cannot be read or holds no token: check its path and rights",
            ),
            Self::AccessDenied => row(
                "access_denied",
                403,
                seconds(10),
                Level::WARN,
                "the role's trust policy does not allow this service account: check its principal (the OIDC \
                 provider), and its conditions on sub and aud",
            ),
            Self::WebIdentityRefused => row(
                "web_identity_refused",
                403,
                seconds(10),
                Level::ERROR,
                "STS does not accept the token: check that the cluster's issuer is an IAM OIDC provider of the \
                 role's account, that the audience is one of its client ids, and the clocks",
            ),
            Self::BadSessionPolicy => row(
                "bad_session_policy",
                403,
                seconds(10),
                Level::WARN,
                "STS refuses the session policy: correct the session-policy annotations on the service account",
            ),
            Self::BadStsRequest => row(
                "bad_sts_request",
                403,
                seconds(10),
                Level::ERROR,
                "STS refuses the request as invalid: check the role ARN, and that the session duration is within \
                 the role's maximum",
            ),
            Self::RegionDisabled => row(
                "region_disabled",
                403,
                seconds(10),
                Level::ERROR,
                "STS is not active in this region for the role's account: activate it, or choose another --region",
            ),
            Self::StsThrottled => row(
                "sts_throttled",
                503,
                Backoff,
                Level::WARN,
                "STS throttles this account in this region: retried by itself; ask for a higher quota if it stays",
            ),
            Self::StsUnavailable => row(
                "sts_unavailable",
                503,
                Backoff,
                Level::WARN,
                "STS cannot be reached or fails: check the network, the endpoint, its certificate and the AWS status",
            ),
            Self::IdentityProviderUnreachable => row(
                "idp_unreachable",
                503,
                Backoff,
                Level::WARN,
                "STS could not fetch the issuer's keys: check that its discovery document is public",
            ),
            Self::TokenNotYetValid => row(
                "token_not_yet_valid",
                503,
                Backoff,
                Level::WARN,
                "by the clock of STS the token is from the future: set the clocks of the store and of the API server",
            ),
            Self::BadStsAnswer => row(
                "bad_sts_answer",
                503,
                Backoff,
                Level::ERROR,
                "the endpoint's answer is no STS answer: check --sts-endpoint-url and what stands between",
            ),
            Self::ClockSkew => row(
                "clock_skew",
                503,
                Backoff,
                Level::ERROR,
                "by this node's clock the new session has expired already, and SDKs would say so too: set the clock",
            ),
            Self::ExchangeTimeout => row(
                "exchange_timeout",
                503,
                Backoff,
                Level::WARN,
                "token and STS together took longer than 4 s: check the way to the API server and to STS",
            ),
        }
    }
}

/// A no, with what the log needs to make sense of it. Cheap to clone: every waiter gets the same one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub reason: Reason,
    /// Names the object and what was wrong with it. For the log only, never for the pod; never a secret.
    pub detail: Arc<str>,
}

impl Refusal {
    pub fn new(reason: Reason, detail: impl Into<Arc<str>>) -> Self {
        Self { reason, detail: detail.into() }
    }
}

impl From<Reason> for Refusal {
    fn from(reason: Reason) -> Self {
        Self::new(reason, "")
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.reason.info().label)?;
        if self.detail.is_empty() { Ok(()) } else { write!(f, ": {}", self.detail) }
    }
}

impl std::error::Error for Refusal {}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn the_page_on_failures_has_every_row_of_the_table() {
        let page = include_str!("../docs/failures.md");
        for reason in Reason::value_variants() {
            let spec = reason.info();
            let row = page.lines().find(|line| line.starts_with(&format!("| `{}` | {} |", spec.label, spec.status)));
            assert!(row.is_some_and(|row| row.contains(spec.advice)), "{}: {}", spec.label, spec.advice);
        }
    }

    /// IMDS-27: what may pass by itself is never 400, 401, 429 or 500.
    #[test]
    fn what_is_tried_again_is_503() {
        for spec in Reason::value_variants().iter().map(|reason| reason.info()) {
            assert!(spec.retry != RetryPolicy::Backoff || spec.status == 503, "{}", spec.label);
        }
    }
}
