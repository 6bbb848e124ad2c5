//! The web identity token: minted by the API server for one pod, or read from a file where there is no API server.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
};
use kube::{Api, Client, api::PostParams};
use tokio::time::sleep;

use super::credential::Secret;
use crate::{
    authorise::Grant,
    refusal::{Reason, Refusal},
};

/// The shortest that the API server mints; the token is used once, within seconds.
const LIFETIME: Duration = Duration::from_secs(600);
/// The API server's Node authorizer learns of a new pod from a watch of its own, at times later than this agent from
/// its; until then it says 403.
const AUTHORIZER_LAG: Duration = Duration::from_secs(2);
/// Real tokens are 1 to 2 KiB.
const MAX_TOKEN_FILE: usize = 64 << 10;

/// Where tokens come from.
pub enum TokenSource {
    /// The API server, by a client in the name that may mint, once it is known which that is.
    Kubernetes(Arc<OnceLock<Client>>),
    File,
}

impl TokenSource {
    /// # Errors
    /// Why there is none.
    pub async fn token(&self, grant: &Grant) -> Result<Secret, Refusal> {
        match self {
            Self::Kubernetes(client) => match client.get() {
                Some(client) => mint(client, grant).await,
                None => Err(Refusal::new(Reason::TokenUnavailable, "the API server was not reached yet")),
            },
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
            expiration_seconds: i64::try_from(LIFETIME.as_secs()).ok(),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: Some(workload.pod().into()),
                uid: Some(workload.uid().to_string()),
            }),
        },
        ..TokenRequest::default()
    };
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), workload.namespace());
    let mut pause = Duration::from_millis(25);
    loop {
        match accounts.create_token_request(&key.account.name, &PostParams::default(), &request).await {
            Ok(answer) => {
                let token = answer.status.map(|status| status.token).filter(|token| !token.is_empty());
                let none = || Refusal::new(Reason::TokenUnavailable, "the API server answered without a token");
                return token.map(Secret::new).ok_or_else(none);
            }
            Err(error) => {
                let refusal = refused(grant, &error);
                if refusal.reason != Reason::TokenForbidden || grant.age() > AUTHORIZER_LAG {
                    return Err(refusal);
                }
            }
        }
        sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        pause *= 2;
    }
}

fn refused(grant: &Grant, error: &kube::Error) -> Refusal {
    let (workload, key) = (grant.workload(), grant.key());
    let reason = match error {
        kube::Error::Api(status) => match status.code {
            401 => Reason::TokenUnavailable,
            403 => Reason::TokenForbidden,
            // 409: the pod's UID is another one by now.
            404 | 409 => Reason::PodGone,
            400 | 422 => Reason::TokenRefused,
            _ => Reason::TokenUnavailable,
        },
        _ => Reason::TokenUnavailable,
    };
    // The whole status is what kube's own text has, twice.
    let said = match error {
        kube::Error::Api(status) => format!("{} {}", status.code, status.message),
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
    let bytes = zeroize::Zeroizing::new(tokio::fs::read(file).await.map_err(|error| wrong(&error))?);
    if bytes.len() > MAX_TOKEN_FILE {
        return Err(wrong(&"is too large for a token"));
    }
    let token = std::str::from_utf8(&bytes).map(str::trim).unwrap_or_default();
    let looks_right = token.split('.').count() == 3 && token.bytes().all(|byte| byte.is_ascii_graphic());
    looks_right.then(|| Secret::new(token.to_owned())).ok_or_else(|| wrong(&"holds no JWT"))
}

impl std::fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kubernetes(_) => "Kubernetes",
            Self::File => "File",
        })
    }
}
