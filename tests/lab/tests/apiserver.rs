//! The real API server: it starts, and its Node authorizer and tokens are what kirsa relies on.

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::PostParams;
use lab::apiserver::{ApiServer, ISSUER, client_of};
use serde_json::Value;

lab::enter!();

fn claims(token: &str) -> Result<Value> {
    let payload = token.split('.').nth(1).context("a JWT has three parts")?;
    Ok(serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload)?)?)
}

#[tokio::test]
async fn a_token_is_bound_to_its_pod_and_signed_with_a_published_key() -> Result<()> {
    let server = ApiServer::get()?;
    server.node("n1").await?;
    server
        .service_account("tokens", "reader", &[("eks.amazonaws.com/role-arn", "arn:aws:iam::111122223333:role/r")])
        .await?;
    let uid = server.pod("tokens", "p", "reader", "n1").await?;
    let claims = claims(&server.token("tokens", "reader", ("p", &uid), Some("sts.amazonaws.com")).await?)?;
    ensure!(claims["iss"] == ISSUER && claims["aud"][0] == "sts.amazonaws.com", "{claims}");
    ensure!(claims["sub"] == "system:serviceaccount:tokens:reader", "{claims}");
    ensure!(claims["kubernetes.io"]["pod"]["uid"] == uid.as_str(), "{claims}");
    ensure!(claims["kubernetes.io"]["node"]["name"] == "n1", "{claims}");
    ensure!(server.jwks().await?["keys"][0]["alg"] == "RS256");
    Ok(())
}

#[tokio::test]
async fn a_pod_goes_through_its_life() -> Result<()> {
    let server = ApiServer::get()?;
    server.node("n1").await?;
    server.service_account("life", "sa", &[]).await?;
    server.pod("life", "p", "sa", "n1").await?;
    server.set_pod_status("life", "p", "Running", &["10.244.1.9".parse()?, "fd00:244:1::9".parse()?]).await?;
    let status = server.read::<Pod>("life", "p").await?.context("it is there")?.status.context("it was set")?;
    ensure!(status.pod_ips.is_some_and(|ips| ips.len() == 2) && status.phase.as_deref() == Some("Running"));
    server.terminate_pod("life", "p").await?;
    let pod = server.read::<Pod>("life", "p").await?.context("still there")?;
    ensure!(pod.metadata.deletion_timestamp.is_some());
    server.delete_pod("life", "p").await?;
    ensure!(server.read::<Pod>("life", "p").await?.is_none());
    Ok(())
}

#[tokio::test]
async fn an_agent_may_do_what_manifests_allow_and_nothing_else() -> Result<()> {
    let server = ApiServer::get()?;
    let kubeconfig = server.agent_kubeconfig("agents", "kirsa", "n2").await?;
    let request = |path: &str| http::Request::get(path).body(Vec::new());
    let client = client_of(&kubeconfig).await?;
    // What the admission policy for direct minting asks for.
    let review = Api::all(client.clone()).create(&PostParams::default(), &SelfSubjectReview::default()).await?;
    let extra = review.status.and_then(|status| status.user_info).and_then(|user| user.extra).context("who am I")?;
    ensure!(extra["authentication.kubernetes.io/node-name"] == ["n2"], "{extra:?}");
    ensure!(client.request_text(request("/api/v1/pods")?).await.is_err());
    server
        .apply(
            "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata: {name: pods}\n\
             rules: [{apiGroups: [''], resources: [pods], verbs: [list]}]\n---\n\
             apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\nmetadata: {name: pods}\n\
             roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: pods}\n\
             subjects: [{kind: ServiceAccount, name: kirsa, namespace: agents}]\n",
        )
        .await?;
    client.request_text(request("/api/v1/pods")?).await?;
    ensure!(client.request_text(request("/api/v1/secrets")?).await.is_err());
    // The same agent again, as after a restart: the same pod, a new token.
    client_of(&server.agent_kubeconfig("agents", "kirsa", "n2").await?)
        .await?
        .request_text(request("/api/v1/pods")?)
        .await?;
    Ok(())
}
