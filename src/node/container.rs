//! How container credentials come to know whose a token is.

use tracing::{info, warn};

use crate::{
    doctor,
    kubernetes::{ClientFactory, Identity, review},
    serve::container::TokenReviews,
};

/// Reviews by the API server, for tokens of that audience; none where container credentials are not served.
pub(super) fn tokens(kubernetes: &ClientFactory, audience: Option<String>) -> anyhow::Result<Option<TokenReviews>> {
    let Some(audience) = audience else { return Ok(None) };
    info!(audience, "container credentials are served");
    if let Some(address) = doctor::pod_identity_agent() {
        warn!(
            %address,
            "the EKS Pod Identity agent listens here: pods' connections to it come to this agent instead; remove it, \
             or leave --container-credentials out"
        );
    }
    let client = kubernetes.call_client(Identity::Agent)?;
    Ok(Some(TokenReviews::new(Box::new(move |token| {
        let (client, audience) = (client.clone(), audience.clone());
        Box::pin(async move { review::review_token(client, &token, &audience).await })
    }))))
}
