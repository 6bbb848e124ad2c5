//! Whose a service account token is, by the word of the API server that issued it (TokenReview).

use std::sync::Arc;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::{Api, Client, api::PostParams};

use crate::refusal::{Reason, Refusal};

/// What the API server says of the pod that a token is bound to (Kubernetes reference, "Managing Service Accounts").
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// The UID of the pod that the token is bound to; empty for a token that is bound to none.
///
/// # Errors
/// The token is not good for this audience, or the API server does not say.
pub async fn pod_of(client: Client, token: &str, audience: &str) -> Result<Arc<str>, Refusal> {
    let review = TokenReview {
        spec: TokenReviewSpec { audiences: Some(vec![audience.into()]), token: Some(token.into()) },
        ..TokenReview::default()
    };
    let reviews: Api<TokenReview> = Api::all(client);
    let status = match reviews.create(&PostParams::default(), &review).await {
        Ok(answer) => answer.status.unwrap_or_default(),
        Err(kube::Error::Api(status)) if status.code == 403 => {
            return Err(Refusal::new(Reason::ReviewForbidden, without(token, &status.message)));
        }
        Err(error) => return Err(Refusal::new(Reason::ReviewUnavailable, without(token, &error.to_string()))),
    };
    // An authenticator that knows nothing of audiences leaves them out: then the token is good for nobody in particular.
    let meant = status.audiences.iter().flatten().any(|of| of == audience);
    if status.authenticated != Some(true) || !meant {
        let said = status.error.unwrap_or_else(|| "no reason given".into());
        return Err(Refusal::new(
            Reason::ContainerTokenRefused,
            format!("for the audience {audience}: {}", without(token, &said)),
        ));
    }
    let extra = status.user.and_then(|user| user.extra).unwrap_or_default();
    Ok(extra.get(POD_UID).and_then(|values| values.first()).map_or_else(|| "".into(), |uid| uid.as_str().into()))
}

/// Nothing keeps an API server from quoting what it refuses.
fn without(token: &str, text: &str) -> String {
    let parts = token.split('.').filter(|part| part.len() >= 8);
    parts.fold(text.to_owned(), |text, part| text.replace(part, "[redacted]"))
}
