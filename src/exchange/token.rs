//! The web identity token: minted by the API server for one pod, or read from a file where there is no API server.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use k8s_openapi::{
    api::{
        authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
        core::v1::ServiceAccount,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{Api, Client, api::PostParams};
use tokio::{io::AsyncReadExt, sync::Notify, time::sleep};

use super::credential::Secret;
use crate::{
    authorise::Grant,
    clock::Backoff,
    refusal::{Reason, Refusal},
};

/// The shortest that the API server mints; the token is used once, within seconds.
const LIFETIME: u32 = 600;
/// The longest that the admission policies allow. S3-compatible stores may let no session outlast its token (MinIO,
/// `updateClaimsExpiry`), and ten minutes are too little for SDKs.
const STORE_LIFETIME: u32 = 3_600;
/// The API server's Node authorizer and its NodeRestriction admission learn of a new pod from watches of their own, at
/// times later than this agent from its; until then the one says 403 and the other 404.
const ADMISSION_LAG: Duration = Duration::from_secs(2);
/// Real tokens are 1 to 2 KiB.
const MAX_TOKEN_FILE: usize = 64 << 10;

/// Where tokens come from.
pub enum TokenSource {
    Kubernetes(Arc<TokenMinter>),
    File,
}

/// A client of the API server in the name that may mint, once it is known which that is.
#[derive(Default)]
pub struct TokenMinter {
    client: RwLock<Option<Client>>,
    forbidden: Notify,
}

impl TokenMinter {
    pub fn set(&self, client: Client) {
        *self.client.write().unwrap_or_else(PoisonError::into_inner) = Some(client);
    }

    /// Returns when the API server has forbidden a token: it may be another name that may mint now.
    pub async fn forbidden(&self) {
        self.forbidden.notified().await;
    }

    async fn mint(&self, grant: &Grant) -> Result<Secret, Refusal> {
        let client = self.client.read().unwrap_or_else(PoisonError::into_inner).clone();
        let unknown = || Refusal::new(Reason::TokenUnavailable, "the API server was not reached yet");
        let minted = mint(&client.ok_or_else(unknown)?, grant).await;
        if minted.as_ref().is_err_and(|refusal| refusal.reason == Reason::TokenForbidden) {
            self.forbidden.notify_one();
        }
        minted
    }
}

impl TokenSource {
    /// # Errors
    /// Why there is none.
    pub async fn token(&self, grant: &Grant) -> Result<Secret, Refusal> {
        match self {
            Self::Kubernetes(minting) => minting.mint(grant).await,
            Self::File => read(grant).await,
        }
    }
}

/// Bound to the pod by name *and* UID: if the pod is gone, or its address was attributed wrongly, the API server
/// refuses instead of handing out somebody's token.
async fn mint(client: &Client, grant: &Grant) -> Result<Secret, Refusal> {
    let (workload, key) = (grant.workload(), grant.key());
    let request = TokenRequest {
        spec: TokenRequestSpec {
            audiences: vec![key.audience.clone()],
            expiration_seconds: Some(lifetime(grant).into()),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: Some(workload.pod().into()),
                uid: Some(workload.uid().to_string()),
            }),
        },
        // API servers before 1.34 ignore it; later ones answer 409 for an account that was recreated.
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
            Ok(answer) => {
                let token = answer.status.map(|status| status.token).filter(|token| !token.is_empty());
                let none = || Refusal::new(Reason::TokenUnavailable, "the API server answered without a token");
                return token.map(Secret::new).ok_or_else(none);
            }
            Err(error) => {
                let refusal = refused(grant, &error);
                // Lag never explains a conflict: the UID of the pod or of its account is another one by now.
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

/// In seconds.
fn lifetime(grant: &Grant) -> u32 {
    let of_aws = grant.role().account().is_some();
    if of_aws { LIFETIME } else { grant.key().duration.clamp(LIFETIME, STORE_LIFETIME) }
}

fn refused(grant: &Grant, error: &kube::Error) -> Refusal {
    let (workload, key) = (grant.workload(), grant.key());
    let reason = match error {
        kube::Error::Api(status) => match status.code {
            401 => Reason::TokenUnavailable,
            403 => Reason::TokenForbidden,
            // 409: the UID of the pod or of its service account is another one by now.
            404 | 409 => Reason::PodGone,
            400 | 422 => Reason::TokenRefused,
            _ => Reason::TokenUnavailable,
        },
        _ => Reason::TokenUnavailable,
    };
    // The whole status is what kube's own text has, twice.
    let said = match error {
        kube::Error::Api(status) => format!("{} {}", status.code, status.message),
        // Its text may quote the answer, and so the token.
        kube::Error::SerdeError(error) => {
            format!("the answer is no TokenRequest (line {}, column {})", error.line(), error.column())
        }
        other => describe(other),
    };
    Refusal::new(
        reason,
        format!(
            "TokenRequest for service account {}, pod {workload} (UID {}), audience {}: {said}",
            key.account,
            workload.uid(),
            key.audience
        ),
    )
}

/// The error and what caused it, since hyper's own texts say no more than "client error".
pub(crate) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

async fn read(grant: &Grant) -> Result<Secret, Refusal> {
    let file = grant.key().token_file.as_ref();
    let file = file.ok_or_else(|| Refusal::new(Reason::TokenFile, format!("{} has no tokenFile", grant.workload())))?;
    let wrong = |what: &dyn std::fmt::Display| {
        Refusal::new(Reason::TokenFile, format!("tokenFile {} of {}: {what}", file.display(), grant.workload()))
    };
    let mut bytes = zeroize::Zeroizing::new(Vec::with_capacity(MAX_TOKEN_FILE + 1));
    let opened = tokio::fs::File::open(file).await.map_err(|error| wrong(&error))?;
    opened.take(MAX_TOKEN_FILE as u64 + 1).read_to_end(&mut bytes).await.map_err(|error| wrong(&error))?;
    if bytes.len() > MAX_TOKEN_FILE {
        return Err(wrong(&"is too large for a token"));
    }
    let token = std::str::from_utf8(&bytes).map(str::trim).unwrap_or_default();
    let looks_right = token.split('.').count() == 3 && token.bytes().all(|byte| byte.is_ascii_graphic());
    looks_right.then(|| Secret::new(token.to_owned())).ok_or_else(|| wrong(&"holds no JWT"))
}

impl std::fmt::Debug for TokenMinter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Minting")
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
        authorise::{Account, Defaults},
    };

    const ROLE: &str = "arn:aws:iam::111122223333:role/reader";

    /// An API server that refuses the first `times` TokenRequests with that status, and what it was asked.
    fn refusing(status: u16, times: usize) -> (Client, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
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
        (Client::new(service, "default"), asked)
    }

    fn grant() -> Grant {
        Grant::sample(Workload::sample("a", "uid-a", "reader"), ROLE)
    }

    /// MinIO lets no session outlast its token.
    #[test]
    fn tokens_for_stores_last_as_long_as_the_session() {
        let lifetime = |role| {
            let account = Account::of_annotations("sa-uid", [("eks.amazonaws.com/role-arn", role)]);
            let defaults = Defaults { foreign_arns: true, ..Defaults::sample() };
            lifetime(&Grant::of_account(Workload::sample("a", "uid-a", "reader"), &account, &defaults).unwrap())
        };
        assert_eq!(lifetime(ROLE), LIFETIME);
        assert_eq!(lifetime("arn:minio:iam:::role/reader"), STORE_LIFETIME);
    }

    /// An API server of its own mind, or what stands before one.
    #[tokio::test]
    async fn an_answer_that_is_no_token_request_is_quoted_nowhere() {
        for answer in [
            serde_json::json!({"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "metadata": {},
                "spec": {"audiences": []}, "status": {"token": "a.secret.c"}}),
            serde_json::json!({"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "metadata": {},
                "spec": {"audiences": []}, "status": "a.secret.c"}),
        ] {
            let service = tower::service_fn(move |_: Request<Body>| {
                let body = Body::from(answer.to_string().into_bytes());
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
    async fn a_pod_that_the_api_server_is_yet_to_learn_of_is_asked_for_again() {
        for status in [403, 404] {
            let (client, asked) = refusing(status, 3);
            assert!(mint(&client, &grant()).await.is_ok(), "{status}");
            assert_eq!(asked.load(Ordering::SeqCst), 4);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_lag_does_not_explain_is_refused_at_once_and_the_rest_soon() {
        for (status, reason) in [(409, Reason::PodGone), (422, Reason::TokenRefused), (500, Reason::TokenUnavailable)] {
            let (client, asked) = refusing(status, usize::MAX);
            assert_eq!(mint(&client, &grant()).await.unwrap_err().reason, reason);
            assert_eq!(asked.load(Ordering::SeqCst), 1);
        }
        for (status, reason) in [(403, Reason::TokenForbidden), (404, Reason::PodGone)] {
            let (client, asked) = refusing(status, usize::MAX);
            let (grant, began) = (grant(), Instant::now());
            assert_eq!(mint(&client, &grant).await.unwrap_err().reason, reason);
            assert!(began.elapsed() < 3 * ADMISSION_LAG, "{:?}", began.elapsed());
            let before = asked.load(Ordering::SeqCst);
            assert!(mint(&client, &grant).await.is_err());
            assert_eq!(asked.load(Ordering::SeqCst), before + 1, "a pod known for that long is not waited for");
        }
    }
}
