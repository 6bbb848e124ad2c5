//! Web identity tokens: minted by the API server for one pod, or read from a file without Kubernetes.

use std::{sync::Arc, time::Duration};

use k8s_openapi::{
    api::{
        authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
        core::v1::ServiceAccount,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{Api, Client, api::PostParams};
use parking_lot::RwLock;
use tokio::{io::AsyncReadExt, sync::Notify, time::sleep};

use super::credential::Secret;
use crate::{
    authorize::Grant,
    clock::Backoff,
    refusal::{Reason, Refusal},
};

/// Minimum that the API server mints. A token is used once, within seconds.
const TOKEN_LIFETIME: Duration = Duration::from_secs(600);
/// Maximum that the admission policies allow. S3-compatible stores may end a session with its token, and sessions of ten
/// minutes are too short for SDKs: <https://github.com/minio/minio/blob/master/internal/config/identity/openid/jwt.go>
/// (`updateClaimsExpiry`).
const STORE_TOKEN_LIFETIME: Duration = Duration::from_secs(3_600);
/// Maximum delay until the API server's Node authorizer (403) and NodeRestriction admission (404) know a new pod. They
/// have watches of their own, which may lag behind this agent's.
const ADMISSION_LAG: Duration = Duration::from_secs(2);
/// Maximum size of a token file. Real tokens have 1 to 2 KiB.
const MAX_TOKEN_FILE: usize = 64 << 10;

/// Source of web identity tokens.
pub enum TokenSource {
    Kubernetes(Arc<TokenMinter>),
    File,
}

/// Mints tokens with TokenRequest, once it is known which identity may do so.
#[derive(Default)]
pub struct TokenMinter {
    /// Client of that identity.
    client: RwLock<Option<Client>>,
    forbidden: Notify,
}

impl TokenMinter {
    pub fn set_client(&self, client: Client) {
        *self.client.write() = Some(client);
    }

    /// Returns when the API server has forbidden a token: another identity may be allowed to mint now.
    pub async fn wait_forbidden(&self) {
        self.forbidden.notified().await;
    }

    async fn mint(&self, grant: &Grant) -> Result<Secret, Refusal> {
        let client = self.client.read().clone();
        let no_client = || Refusal::new(Reason::TokenUnavailable, "the API server has not been reached yet");
        let result = mint(&client.ok_or_else(no_client)?, grant).await;
        if result.as_ref().is_err_and(|refusal| refusal.reason == Reason::TokenForbidden) {
            self.forbidden.notify_one();
        }
        result
    }
}

impl TokenSource {
    /// # Errors
    /// `TokenForbidden`, `TokenRefused`, `PodGone` or `TokenUnavailable` if the API server mints no token; `TokenFile` if
    /// the file cannot be read or holds no JWT.
    pub async fn token(&self, grant: &Grant) -> Result<Secret, Refusal> {
        match self {
            Self::Kubernetes(minter) => minter.mint(grant).await,
            Self::File => read_token_file(grant).await,
        }
    }
}

/// Requests a token that is bound to the pod by name *and* UID: if the pod is gone, or its address was attributed wrongly,
/// the API server rejects the request instead of issuing another pod's token.
async fn mint(client: &Client, grant: &Grant) -> Result<Secret, Refusal> {
    let (workload, key) = (grant.workload(), grant.key());
    let request = TokenRequest {
        spec: TokenRequestSpec {
            audiences: vec![key.audience.clone()],
            expiration_seconds: i64::try_from(lifetime(grant).as_secs()).ok(),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: Some(workload.pod().into()),
                uid: Some(workload.uid().to_string()),
            }),
        },
        // API servers before 1.34 ignore the UID; later ones return 409 for a recreated account.
        metadata: ObjectMeta {
            uid: Some(key.account_uid.to_string()).filter(|uid| !uid.is_empty()),
            ..ObjectMeta::default()
        },
        ..TokenRequest::default()
    };
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), workload.namespace());
    let mut backoff = Backoff::new(Duration::from_millis(25), ADMISSION_LAG);
    loop {
        match accounts.create_token_request(&key.account.name, &PostParams::default(), &request).await {
            Ok(response) => {
                let token = response.status.map(|status| status.token).filter(|token| !token.is_empty());
                let missing = || Refusal::new(Reason::TokenUnavailable, "the API server's response has no token");
                return token.map(Secret::new).ok_or_else(missing);
            }
            Err(error) => {
                let refusal = refusal_from(grant, &error);
                // Lag never explains a conflict: the UID of the pod or of its account has changed.
                let conflict = matches!(&error, kube::Error::Api(status) if status.code == 409);
                let may_lag = !conflict && matches!(refusal.reason, Reason::TokenForbidden | Reason::PodGone);
                if !may_lag || grant.age() > ADMISSION_LAG {
                    return Err(refusal);
                }
            }
        }
        sleep(backoff.pause()).await;
    }
}

fn lifetime(grant: &Grant) -> Duration {
    let is_aws = grant.role().account().is_some();
    if is_aws { TOKEN_LIFETIME } else { grant.key().duration.clamp(TOKEN_LIFETIME, STORE_TOKEN_LIFETIME) }
}

fn refusal_from(grant: &Grant, error: &kube::Error) -> Refusal {
    let (workload, key) = (grant.workload(), grant.key());
    let reason = match error {
        kube::Error::Api(status) => match status.code {
            401 => Reason::TokenUnavailable,
            403 => Reason::TokenForbidden,
            // 409: the UID of the pod or of its service account has changed.
            404 | 409 => Reason::PodGone,
            400 | 422 => Reason::TokenRefused,
            _ => Reason::TokenUnavailable,
        },
        _ => Reason::TokenUnavailable,
    };
    // The whole status is what kube's own text has, twice.
    let message = match error {
        kube::Error::Api(status) => format!("{} {}", status.code, status.message),
        // The error's own text may quote the response, and so the token.
        kube::Error::SerdeError(error) => {
            format!("the response is not a TokenRequest (line {}, column {})", error.line(), error.column())
        }
        other => with_causes(other),
    };
    Refusal::new(
        reason,
        format!(
            "TokenRequest for service account {}, pod {workload} (UID {}), audience {}: {message}",
            key.account,
            workload.uid(),
            key.audience
        ),
    )
}

/// Returns the error with its causes: hyper's own message is only "client error".
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
        cause = error.source();
    }
    text
}

async fn read_token_file(grant: &Grant) -> Result<Secret, Refusal> {
    let file = grant.key().token_file.as_ref();
    let file = file.ok_or_else(|| Refusal::new(Reason::TokenFile, format!("{} has no tokenFile", grant.workload())))?;
    let refuse = |problem: &dyn std::fmt::Display| {
        Refusal::new(Reason::TokenFile, format!("tokenFile {} of {}: {problem}", file.display(), grant.workload()))
    };
    let mut bytes = zeroize::Zeroizing::new(Vec::with_capacity(MAX_TOKEN_FILE + 1));
    let opened = tokio::fs::File::open(file).await.map_err(|error| refuse(&error))?;
    opened.take(MAX_TOKEN_FILE as u64 + 1).read_to_end(&mut bytes).await.map_err(|error| refuse(&error))?;
    if bytes.len() > MAX_TOKEN_FILE {
        return Err(refuse(&"is too large to be a token"));
    }
    let token = std::str::from_utf8(&bytes).map(str::trim).unwrap_or_default();
    let is_jwt = token.split('.').count() == 3 && token.bytes().all(|byte| byte.is_ascii_graphic());
    is_jwt.then(|| Secret::new(token.to_owned())).ok_or_else(|| refuse(&"does not hold a JWT"))
}

impl std::fmt::Debug for TokenMinter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenMinter")
    }
}

impl std::fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kubernetes(_) => "Kubernetes",
            Self::File => "File",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use http::{Request, Response};
    use kube::client::Body;
    use tokio::time::Instant;

    use super::*;
    use crate::{
        attribute::Workload,
        authorize::{Account, Defaults},
    };

    const ROLE: &str = "arn:aws:iam::111122223333:role/reader";

    /// Returns an API server that rejects the first `times` TokenRequests with that status, and its request counter.
    fn rejecting(status: u16, times: usize) -> (Client, Arc<AtomicUsize>) {
        let requests = Arc::new(AtomicUsize::new(0));
        let count = requests.clone();
        let service = tower::service_fn(move |_: Request<Body>| {
            let nth = count.fetch_add(1, Ordering::SeqCst);
            let body = if nth < times {
                serde_json::json!({"kind": "Status", "status": "Failure", "message": "no", "reason": "no", "code": status})
            } else {
                serde_json::json!({"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1",
                    "metadata": {}, "spec": {"audiences": []},
                    "status": {"token": "a.b.c", "expirationTimestamp": "2026-01-01T00:00:00Z"}})
            };
            let status = if nth < times { status } else { 201 };
            let response = Response::builder().status(status).body(Body::from(body.to_string().into_bytes()));
            async move { Ok::<_, Infallible>(response.unwrap()) }
        });
        (Client::new(service, "default"), requests)
    }

    fn grant() -> Grant {
        Grant::sample(Workload::sample("a", "uid-a", "reader"), ROLE)
    }

    /// MinIO ends a session with its token.
    #[test]
    fn store_tokens_last_as_long_as_sessions() {
        let lifetime = |role| {
            let account = Account::from_annotations("sa-uid", [("eks.amazonaws.com/role-arn", role)]);
            let defaults = Defaults { store_arns: true, ..Defaults::sample() };
            lifetime(&Grant::from_account(Workload::sample("a", "uid-a", "reader"), &account, &defaults).unwrap())
        };
        assert_eq!(lifetime(ROLE), TOKEN_LIFETIME);
        assert_eq!(lifetime("arn:minio:iam:::role/reader"), STORE_TOKEN_LIFETIME);
    }

    /// A proxy in front of the API server may return anything.
    #[tokio::test]
    async fn malformed_response_is_never_quoted() {
        for response in [
            serde_json::json!({"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "metadata": {},
                "spec": {"audiences": []}, "status": {"token": "a.secret.c"}}),
            serde_json::json!({"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "metadata": {},
                "spec": {"audiences": []}, "status": "a.secret.c"}),
        ] {
            let service = tower::service_fn(move |_: Request<Body>| {
                let body = Body::from(response.to_string().into_bytes());
                async move { Ok::<_, Infallible>(Response::new(body)) }
            });
            let refusal = mint(&Client::new(service, "default"), &grant()).await.unwrap_err();
            assert_eq!(refusal.reason, Reason::TokenUnavailable);
            assert!(!refusal.detail.contains("secret"), "{refusal}");
        }
    }

    #[tokio::test]
    async fn token_request_names_account_uid() {
        let service = tower::service_fn(|request: Request<Body>| async {
            let body = request.into_body().collect_bytes().await.unwrap();
            let sent: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(sent["metadata"]["uid"], "sa-uid");
            assert_eq!(sent["spec"]["boundObjectRef"]["uid"], "uid-a");
            Ok::<_, Infallible>(Response::builder().status(409).body(Body::empty()).unwrap())
        });
        assert!(mint(&Client::new(service, "default"), &grant()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn new_pod_is_retried_during_admission_lag() {
        for status in [403, 404] {
            let (client, requests) = rejecting(status, 3);
            assert!(mint(&client, &grant()).await.is_ok(), "{status}");
            assert_eq!(requests.load(Ordering::SeqCst), 4);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn retries_end_after_the_admission_lag() {
        for (status, reason) in [(409, Reason::PodGone), (422, Reason::TokenRefused), (500, Reason::TokenUnavailable)] {
            let (client, requests) = rejecting(status, usize::MAX);
            assert_eq!(mint(&client, &grant()).await.unwrap_err().reason, reason);
            assert_eq!(requests.load(Ordering::SeqCst), 1);
        }
        for (status, reason) in [(403, Reason::TokenForbidden), (404, Reason::PodGone)] {
            let (client, requests) = rejecting(status, usize::MAX);
            let (grant, began) = (grant(), Instant::now());
            assert_eq!(mint(&client, &grant).await.unwrap_err().reason, reason);
            assert!(began.elapsed() < 3 * ADMISSION_LAG, "{:?}", began.elapsed());
            let before = requests.load(Ordering::SeqCst);
            assert!(mint(&client, &grant).await.is_err());
            assert_eq!(requests.load(Ordering::SeqCst), before + 1, "the pod is known for longer than the lag");
        }
    }
}
