//! TokenReview: verifies a service-account token at the API server and returns the pod that it is bound to.

use std::sync::Arc;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::{Api, Client, api::PostParams};

use crate::refusal::{Reason, Refusal};

/// Extra field of the reviewed user with the UID of the bound pod:
/// <https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/#bound-service-account-tokens>.
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// Returns the UID of the pod that the token is bound to; it is empty if the token is bound to no pod.
///
/// # Errors
/// `ContainerTokenRefused` if the token is not valid for this audience; `ReviewForbidden` or `ReviewUnavailable` if the API
/// server does not review it.
pub async fn review_token(client: Client, token: &str, audience: &str) -> Result<Arc<str>, Refusal> {
    let review = TokenReview {
        spec: TokenReviewSpec { audiences: Some(vec![audience.into()]), token: Some(token.into()) },
        ..TokenReview::default()
    };
    let reviews: Api<TokenReview> = Api::all(client);
    let status = match reviews.create(&PostParams::default(), &review).await {
        Ok(review) => review.status.unwrap_or_default(),
        Err(kube::Error::Api(status)) if status.code == 403 => {
            return Err(Refusal::new(Reason::ReviewForbidden, redact(token, &status.message)));
        }
        Err(error) => return Err(Refusal::new(Reason::ReviewUnavailable, redact(token, &error.to_string()))),
    };
    // An authenticator without support for audiences returns none: then the token is valid for no audience in particular.
    let audience_matches = status.audiences.iter().flatten().any(|accepted| accepted == audience);
    if status.authenticated != Some(true) || !audience_matches {
        let error = status.error.unwrap_or_else(|| "no reason given".into());
        return Err(Refusal::new(
            Reason::ContainerTokenRefused,
            format!("for the audience {audience}: {}", redact(token, &error)),
        ));
    }
    let extra = status.user.and_then(|user| user.extra).unwrap_or_default();
    Ok(extra.get(POD_UID).and_then(|values| values.first()).map_or_else(|| "".into(), |uid| uid.as_str().into()))
}

/// Removes the token from a message: the API server may quote what it rejects.
fn redact(token: &str, text: &str) -> String {
    let parts = token.split('.').filter(|part| part.len() >= 8);
    parts.fold(text.to_owned(), |text, part| text.replace(part, "[redacted]"))
}
