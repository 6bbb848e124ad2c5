//! Token reviews for container credentials.

use tracing::{info, warn};

use crate::{
    doctor,
    kubernetes::{ClientFactory, Identity, review},
    serve::container::TokenReviews,
};

/// Returns a reviewer of tokens with this audience, or `None` if container credentials are disabled.
///
/// # Errors
/// Fails if no client for the API server can be built.
pub(super) fn tokens(kubernetes: &ClientFactory, audience: Option<String>) -> anyhow::Result<Option<TokenReviews>> {
    let Some(audience) = audience else { return Ok(None) };
    info!(audience, "the agent serves container credentials");
    if let Some(address) = doctor::pod_identity_agent() {
        warn!(
            %address,
            "an EKS Pod Identity agent listens on this node, and pods' connections to it are redirected to kirsa: \
             remove that agent, or do not set --container-credentials"
        );
    }
    let client = kubernetes.call_client(Identity::Agent)?;
    Ok(Some(TokenReviews::new(Box::new(move |token| {
        let (client, audience) = (client.clone(), audience.clone());
        Box::pin(async move { review::review_token(client, &token, &audience).await })
    }))))
}
