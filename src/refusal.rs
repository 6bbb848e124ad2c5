//! The table of refusals: for each [`Reason`] the response to the pod, the label for logs and metrics, the retry policy and
//! the advice to the operator. The pod learns little, the log has the details.
//!
//! Stages return a [`Refusal`]; only `serve` turns one into a response.

use std::{fmt, sync::Arc, time::Duration};

use tracing::Level;

/// How long a refusal is cached before the next attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryPolicy {
    /// The refusal is not the result of an exchange, and is not cached.
    None,
    /// An earlier retry cannot help: somebody has to change something.
    Fixed(Duration),
    /// The failure may be transient: retried with exponential backoff and full jitter.
    Backoff,
}

/// One row of the table.
#[derive(Debug)]
pub struct ReasonInfo {
    /// Metric label, and `reason` in the log.
    pub label: &'static str,
    /// HTTP status of the response to the pod.
    pub status: u16,
    pub retry: RetryPolicy,
    pub level: Level,
    /// Advice: the check or change that an operator should make.
    pub advice: &'static str,
}

const fn seconds(n: u64) -> RetryPolicy {
    RetryPolicy::Fixed(Duration::from_secs(n))
}

/// Generates [`Reason`] from the rows `Variant: label, status, retry policy, log level, advice;`.
macro_rules! reasons {
    ($($reason:ident: $label:literal, $status:literal, $retry:expr, $level:ident, $advice:literal;)+) => {
        /// Reason of a refusal. The set is bounded, so that it can be a metric label.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Reason {
            $($reason,)+
        }

        impl Reason {
            pub const ALL: &[Self] = &[$(Self::$reason,)+];

            /// Returns the row of the reason.
            pub const fn info(self) -> ReasonInfo {
                use RetryPolicy::{Backoff, None};
                match self {
                    $(Self::$reason => ReasonInfo {
                        label: $label,
                        status: $status,
                        retry: $retry,
                        level: Level::$level,
                        advice: $advice,
                    },)+
                }
            }
        }
    };
}

// A new refusal is one row here. KIRSA_BLESS=1 cargo test --lib refusal:: writes docs/failures.md.
//
// Statuses follow what SDKs do with them (docs/imds-requirements.md, 24 to 28): 404 is final for every client, 403 means
// denied, 503 makes them retry; 400, 401, 429 and 500 are wrong for anything transient.
reasons! {
    // The request.
    NotFound: "not_found", 404, None, DEBUG,
        "check the path: kirsa does not serve it";
    MethodNotAllowed: "method_not_allowed", 405, None, DEBUG,
        "use GET or HEAD, or PUT for /latest/api/token";
    BadRequest: "bad_request", 400, None, DEBUG,
        "check the client: it must send plain HTTP/1.1";
    BadTtl: "bad_ttl", 400, None, DEBUG,
        "set X-aws-ec2-metadata-token-ttl-seconds to a number from 1 to 21600";
    ForwardedToken: "forwarded_token", 403, None, WARN,
        "remove the reverse proxy in the pod that forwards requests to the metadata address: IMDSv2 rejects them to \
         prevent SSRF";
    ImdsTokenRequired: "imds_token_required", 401, None, INFO,
        "update the SDK to one that uses IMDSv2, or allow IMDSv1 (--require-imdsv2, --require-imdsv2-namespaces, \
         kirsa.dev/require-imdsv2)";
    ImdsTokenInvalid: "imds_token_invalid", 401, None, INFO,
        "request a new IMDS token, as SDKs do: this one is malformed, has expired or was issued to another pod";
    ContainerTokenMissing: "container_token_missing", 400, None, INFO,
        "send one Authorization header with the content of the file that AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE names";
    TooManyRequests: "too_many_requests", 503, None, WARN,
        "check what the source runs, or raise --max-requests-per-source";
    TooManyConnections: "too_many_connections", 503, None, WARN,
        "check what the source runs, or raise --max-connections-per-source or --max-connections";

    // The identity of the caller.
    NotRedirected: "not_redirected", 403, None, WARN,
        "use 169.254.169.254:80; if the pod does, it is routed around the redirect, as with security groups for pods \
         in strict mode: set POD_SECURITY_GROUP_ENFORCING_MODE=standard, or use IRSA or EKS Pod Identity in that pod";
    Starting: "starting", 503, None, INFO,
        "wait until the agent has read the pods, the service accounts and the node's metadata; /readyz shows which of \
         the first two is pending";
    UnknownPod: "unknown_pod", 503, None, WARN,
        "check whether the source is a hostNetwork pod or a process of the node, whether the CNI translates source \
         addresses, and whether the watch lags (kirsa_watch_silence_seconds); in an IPv6 EKS cluster set \
         AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE=IPv6 in the pod: no live pod of this node has the source address";
    AmbiguousAddress: "ambiguous_address", 503, None, ERROR,
        "find the live pods that claim the source address and delete all but one: none of them is served until then";
    ContainerTokenRefused: "container_token_refused", 400, None, WARN,
        "check that the token is a projected one for --container-audience, has not expired and is bound to an \
         existing pod";
    ContainerTokenMismatch: "container_token_mismatch", 403, None, ERROR,
        "find out how the token got there: it is bound to no pod, or to another pod than the source address belongs to";
    ReviewForbidden: "review_forbidden", 503, None, ERROR,
        "apply daemonset/components/container-credentials: the agent may not create tokenreviews";
    ReviewUnavailable: "review_unavailable", 503, None, WARN,
        "check API-server health and network connectivity: TokenReviews fail";

    // The pod's role.
    NoRole: "no_role", 404, None, INFO,
        "annotate the service account with its role ARN if the pod should have a role";
    BadAnnotation: "bad_annotation", 403, None, WARN,
        "correct the annotation on the service account; the next request reads it again";
    AccountUnavailable: "account_unavailable", 503, None, WARN,
        "check API-server health and network connectivity: the service account cannot be read";

    // The pod's service-account token.
    TokenForbidden: "token_forbidden", 503, seconds(10), ERROR,
        "compare the agent's RBAC and the admission policy with daemonset/, and the audience with the one that they \
         allow: the agent may not mint this token";
    TokenRefused: "token_refused", 503, seconds(10), ERROR,
        "check the audience: the API server rejects the TokenRequest as malformed";
    PodGone: "pod_gone", 503, seconds(5), INFO,
        "do nothing: the pod or its service account was deleted";
    TokenUnavailable: "token_unavailable", 503, Backoff, WARN,
        "check API-server health and network connectivity: TokenRequests fail";
    TokenFile: "token_file", 503, seconds(5), ERROR,
        "check the path, permissions and content of the workload's tokenFile: it must hold a JWT";

    // The exchange at STS.
    AccessDenied: "access_denied", 403, seconds(10), WARN,
        "check the role's trust policy: its principal (the OIDC provider) and its conditions on sub and aud must \
         allow this service account";
    WebIdentityRefused: "web_identity_refused", 403, seconds(10), ERROR,
        "check that the cluster's issuer is an IAM OIDC provider of the role's account, that the token's audience is \
         one of its client IDs, and that the clocks agree";
    BadSessionPolicy: "bad_session_policy", 403, seconds(10), WARN,
        "correct the session-policy annotations on the service account: STS rejects the session policy";
    BadStsRequest: "bad_sts_request", 403, seconds(10), ERROR,
        "check the role ARN, and that the session duration is within the role's maximum: STS rejects the request as \
         invalid";
    RegionDisabled: "region_disabled", 403, seconds(10), ERROR,
        "activate STS in this region for the role's account, or set another --region";
    StsThrottled: "sts_throttled", 503, Backoff, WARN,
        "request a higher quota if this persists: STS throttles this account in this region; kirsa retries";
    StsUnavailable: "sts_unavailable", 503, Backoff, WARN,
        "check the network, the STS endpoint, its certificate and the AWS status page";
    IdentityProviderUnreachable: "idp_unreachable", 503, Backoff, WARN,
        "check that the issuer's discovery document is public: STS could not fetch the issuer's keys";
    TokenNotYetValid: "token_not_yet_valid", 503, Backoff, WARN,
        "synchronize the clocks of the store and of the API server: by the clock of STS the token is not valid yet";
    BadStsResponse: "bad_sts_response", 503, Backoff, ERROR,
        "check --sts-endpoint-url and the proxies before it: the response is not that of an STS";
    ClockSkew: "clock_skew", 503, Backoff, ERROR,
        "synchronize this node's clock: by it the new session has already expired";
    ExchangeTimeout: "exchange_timeout", 503, Backoff, WARN,
        "check connectivity to the API server and to STS: TokenRequest and STS took longer than 4 s together";
}

/// A refusal with its details for the log. Cheap to clone: each waiter of a shared exchange gets the same one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub reason: Reason,
    /// Names the object and the problem. For the log only: it is never sent to a pod, and holds no secret.
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
    use super::*;

    /// docs/failures.md has this table. `KIRSA_BLESS=1` writes it.
    #[test]
    fn failures_page_is_current() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/failures.md");
        let page = std::fs::read_to_string(&path).unwrap();
        let (head, rest) = page.split_once("| reason |").unwrap();
        let (_, tail) = rest.split_once("\n\n").unwrap();
        let rows: Vec<_> = Reason::ALL.iter().map(|reason| row(&reason.info())).collect();
        let table = format!("| reason | status | next attempt | what to do |\n|---|---|---|---|\n{}", rows.join("\n"));
        let current = format!("{head}{table}\n\n{tail}");
        if std::env::var_os("KIRSA_BLESS").is_some() {
            std::fs::write(&path, &current).unwrap();
        }
        assert!(page == current, "docs/failures.md: run this test with KIRSA_BLESS=1");
    }

    fn row(info: &ReasonInfo) -> String {
        let retry = match info.retry {
            RetryPolicy::None => "–".to_owned(),
            RetryPolicy::Fixed(pause) => format!("cached for {} s", pause.as_secs()),
            RetryPolicy::Backoff => "retried with backoff, 0.1 to 30 s, full jitter".to_owned(),
        };
        format!("| `{}` | {} | {retry} | {} |", info.label, info.status, info.advice)
    }

    /// IMDS-27: a transient failure is never 400, 401, 429 or 500.
    #[test]
    fn transient_failures_are_503() {
        for info in Reason::ALL.iter().map(|reason| reason.info()) {
            assert!(info.retry != RetryPolicy::Backoff || info.status == 503, "{}", info.label);
        }
    }
}
