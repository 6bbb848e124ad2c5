//! Both minting modes, with exactly the rights of the manifests.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::{Api, api::PostParams};
use lab::agent::{Agent, field};
use lab::poll::poll;

use crate::TIMEOUT;
use crate::rights::AgentRights;
use crate::site::{AUDIENCE, Site, blocking};

const IMPERSONATION: &str = "daemonset/components/constrained-impersonation";
const DIRECT: &str = "daemonset/components/direct-minting";

fn logged_mode(agent: &Agent) -> Result<String> {
    let line = agent.wait_for_log(|entry| field(entry, "mode").is_some())?;
    Ok(field(&line, "mode").unwrap_or_default().to_owned())
}

fn assert_pods_get_own_credentials(rights: AgentRights, name: &str) -> Result<()> {
    let site = Site::with_rights(rights)?;
    site.account("reader")?;
    site.account("writer")?;
    let agent = site.start()?;
    ensure!(logged_mode(&agent)? == name);
    let (reader, writer) = (site.run("reader-0", "reader")?, site.run("writer-0", "writer")?);
    let (first, second) = (site.assert_served(&reader, "reader")?, site.assert_served(&writer, "writer")?);
    ensure!(first != second);
    // The pods of one service account share a session.
    let another = site.run("reader-1", "reader")?;
    ensure!(site.assert_served(&another, "reader")? == first && site.calls("reader").len() == 1);
    let audit = agent.wait_for_log(|entry| field(entry, "access_key_id") == Some(&first))?;
    ensure!(field(&audit, "pod") == Some("reader-0") && field(&audit, "service_account") == Some("reader"), "{audit}");
    agent.stop()
}

#[test]
fn impersonation_serves_own_credentials() -> Result<()> {
    assert_pods_get_own_credentials(AgentRights::Impersonation, "impersonation")
}

#[test]
fn direct_minting_serves_own_credentials() -> Result<()> {
    assert_pods_get_own_credentials(AgentRights::Direct, "direct")
}

#[test]
fn impersonation_is_preferred() -> Result<()> {
    for (flag, used) in [("auto", "impersonation"), ("direct", "direct")] {
        let mut site = Site::with_rights(AgentRights::BothModes)?;
        site.options = site.options.flag("--minting", flag);
        site.account("app")?;
        let agent = site.start()?;
        ensure!(logged_mode(&agent)? == used, "--minting {flag}");
        let pod = site.run("app-0", "app")?;
        site.assert_served(&pod, "app")?;
        agent.stop()?;
    }
    Ok(())
}

/// Changing from one kustomize component to the other needs no restart of the agents.
#[test]
fn revoked_impersonation_switches_to_direct() -> Result<()> {
    let site = Site::with_rights(AgentRights::Revocable)?;
    let agent = site.start()?;
    ensure!(logged_mode(&agent)? == "impersonation");
    let role = format!("kirsa-impersonate-node.{}", AgentRights::Revocable.namespace());
    let without_rules = serde_json::json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": {"name": role}, "rules": []});
    blocking(site.api.apply(&without_rules.to_string()))?;
    // The API server applies the change a moment later; until then, impersonation still works.
    let mut pods = 0;
    poll("direct minting", TIMEOUT, || {
        let name = format!("app{pods}");
        pods += 1;
        site.account(&name).and_then(|()| site.bind(&name, &name)).ok()?;
        agent.log().iter().any(|entry| field(entry, "mode") == Some("direct")).then_some(())
    })?;
    site.account("last")?;
    let pod = site.run("last-0", "last")?;
    site.assert_served(&pod, "last")?;
    agent.stop()
}

#[test]
fn missing_minting_right_names_component() -> Result<()> {
    for (rights, mint, named) in [
        (AgentRights::NoMinting, "auto", &[IMPERSONATION, "direct-minting", "--minting auto"][..]),
        (AgentRights::NoMinting, "impersonation", &[IMPERSONATION, "--minting impersonation"]),
        (AgentRights::NoMinting, "direct", &[DIRECT, "--minting direct"]),
        (AgentRights::Direct, "impersonation", &[IMPERSONATION, "--minting impersonation"]),
        (AgentRights::Impersonation, "direct", &[DIRECT, "--minting direct"]),
    ] {
        let mut site = Site::with_rights(rights)?;
        site.options = site.options.flag("--minting", mint);
        let agent = Agent::spawn(&site.node, &site.options)?;
        let message = agent.process().wait_for_line(TIMEOUT, |line| line.starts_with("error: "))?;
        for named in named {
            ensure!(message.contains(named), "{rights:?}, --minting {mint}: {message}");
        }
        let status = agent.wait()?;
        ensure!(status.code() == Some(1), "{rights:?}, --minting {mint}: {status}");
    }
    Ok(())
}

/// The Node authorizer has its own watch of pods, which may lag behind the agent's.
#[test]
fn burst_of_new_pods_gets_tokens_at_once() -> Result<()> {
    const PODS: usize = 40;
    let site = Site::new()?;
    let name = |pod: usize| format!("app{pod}");
    (0..PODS).try_for_each(|pod| site.account(&name(pod)))?;
    let agent = site.start()?;
    (0..PODS).try_for_each(|pod| site.bind(&name(pod), &name(pod)).map(drop))?;
    let calls = site.sts.wait_for_outcomes(PODS, TIMEOUT)?;
    ensure!(calls.len() == PODS, "{}", calls.len());
    let failed = agent.metric("kirsa_exchange_seconds_count", &[("outcome", "token_forbidden")])?;
    ensure!(failed == 0.0, "{failed} refusals would be in the negative cache");
    agent.stop().context("after the burst")
}

/// Kubernetes 1.34 and later compare the account's UID, so no token is minted with the deleted account's role.
#[test]
fn token_for_recreated_account_conflicts() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let pod_uid = site.bind("app-0", "app")?;
    let minted = |uid: Option<String>| -> Result<u16> {
        let pod = serde_json::json!({"apiVersion": "v1", "kind": "Pod", "name": "app-0", "uid": pod_uid});
        let request = serde_json::from_value(serde_json::json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "metadata": {"uid": uid},
            "spec": {"audiences": [AUDIENCE], "expirationSeconds": 600, "boundObjectRef": pod},
        }))?;
        blocking(async {
            let accounts: Api<ServiceAccount> = Api::namespaced(site.api.client().await?, site.namespace());
            match accounts.create_token_request("app", &PostParams::default(), &request).await {
                Ok(_) => Ok(201),
                Err(kube::Error::Api(status)) => Ok(status.code),
                Err(other) => Err(other.into()),
            }
        })
    };
    let uid = || -> Result<Option<String>> {
        blocking(async {
            let accounts: Api<ServiceAccount> = Api::namespaced(site.api.client().await?, site.namespace());
            Ok(accounts.get("app").await?.metadata.uid)
        })
    };
    let former = uid()?;
    ensure!(minted(former.clone())? == 201);
    site.delete_account("app")?;
    site.account("app")?;
    ensure!(uid()? != former);
    ensure!(minted(former)? == 409, "the former account's UID");
    ensure!(minted(uid()?)? == 201);
    Ok(())
}
