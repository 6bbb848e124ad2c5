//! Both ways of minting, with the rights of the manifests and nothing more.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::{Api, api::PostParams};
use lab::agent::{Agent, field};
use lab::poll::poll;

use crate::PATIENCE;
use crate::rights::Way;
use crate::site::{AUDIENCE, Site, blocking};

const IMPERSONATION: &str = "daemonset/components/constrained-impersonation";
const DIRECT: &str = "daemonset/components/direct-minting";

fn logged_mode(agent: &Agent) -> Result<String> {
    let line = agent.wait_for_log(|entry| field(entry, "mode").is_some())?;
    Ok(field(&line, "mode").unwrap_or_default().to_owned())
}

fn pods_get_credentials_of_their_service_accounts(way: Way, name: &str) -> Result<()> {
    let site = Site::with(way)?;
    site.account("reader")?;
    site.account("writer")?;
    let agent = site.start()?;
    ensure!(logged_mode(&agent)? == name);
    let (reader, writer) = (site.run("reader-0", "reader")?, site.run("writer-0", "writer")?);
    let (first, second) = (site.serves(&reader, "reader")?, site.serves(&writer, "writer")?);
    ensure!(first != second);
    // The pods of one service account share a session.
    let another = site.run("reader-1", "reader")?;
    ensure!(site.serves(&another, "reader")? == first && site.calls("reader").len() == 1);
    let audit = agent.wait_for_log(|entry| field(entry, "access_key_id") == Some(&first))?;
    ensure!(field(&audit, "pod") == Some("reader-0") && field(&audit, "service_account") == Some("reader"), "{audit}");
    agent.stop()
}

#[test]
fn by_impersonation_pods_get_credentials_of_their_service_accounts() -> Result<()> {
    pods_get_credentials_of_their_service_accounts(Way::Impersonate, "impersonation")
}

#[test]
fn by_direct_minting_pods_get_credentials_of_their_service_accounts() -> Result<()> {
    pods_get_credentials_of_their_service_accounts(Way::Direct, "direct")
}

#[test]
fn with_both_rights_impersonation_is_preferred() -> Result<()> {
    for (wanted, used) in [("auto", "impersonation"), ("direct", "direct")] {
        let mut site = Site::with(Way::Either)?;
        site.options = site.options.flag("--minting", wanted);
        site.account("app")?;
        let agent = site.start()?;
        ensure!(logged_mode(&agent)? == used, "--minting {wanted}");
        let pod = site.run("app-0", "app")?;
        site.serves(&pod, "app")?;
        agent.stop()?;
    }
    Ok(())
}

/// Whoever changes from one component to the other need not restart the agents.
#[test]
fn when_its_right_is_taken_away_the_agent_goes_the_other_way() -> Result<()> {
    let site = Site::with(Way::Changing)?;
    let agent = site.start()?;
    ensure!(logged_mode(&agent)? == "impersonation");
    let role = format!("kirsa-impersonate-node.{}", Way::Changing.namespace());
    let without_rules = serde_json::json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": {"name": role}, "rules": []});
    blocking(site.api.apply(&without_rules.to_string()))?;
    // The API server goes by it a moment later: until then pods are minted for as before.
    let mut pods = 0;
    poll("the other way", PATIENCE, || {
        let name = format!("app{pods}");
        pods += 1;
        site.account(&name).and_then(|()| site.bind(&name, &name)).ok()?;
        agent.log().iter().any(|entry| field(entry, "mode") == Some("direct")).then_some(())
    })?;
    site.account("last")?;
    let pod = site.run("last-0", "last")?;
    site.serves(&pod, "last")?;
    agent.stop()
}

#[test]
fn without_the_right_the_agent_ends_and_names_the_component() -> Result<()> {
    for (way, mint, named) in [
        (Way::Neither, "auto", &[IMPERSONATION, "direct-minting", "--minting auto"][..]),
        (Way::Neither, "impersonation", &[IMPERSONATION, "--minting impersonation"]),
        (Way::Neither, "direct", &[DIRECT, "--minting direct"]),
        (Way::Direct, "impersonation", &[IMPERSONATION, "--minting impersonation"]),
        (Way::Impersonate, "direct", &[DIRECT, "--minting direct"]),
    ] {
        let mut site = Site::with(way)?;
        site.options = site.options.flag("--minting", mint);
        let agent = Agent::spawn(&site.node, &site.options)?;
        let said = agent.process().wait_for_line(PATIENCE, |line| line.starts_with("error: "))?;
        for named in named {
            ensure!(said.contains(named), "{way:?}, --minting {mint}: {said}");
        }
        let status = agent.wait()?;
        ensure!(status.code() == Some(1), "{way:?}, --minting {mint}: {status}");
    }
    Ok(())
}

/// The Node authorizer hears of a new pod from a watch of its own, now and then later than the agent does.
#[test]
fn a_burst_of_new_pods_is_minted_for_at_once() -> Result<()> {
    const PODS: usize = 40;
    let site = Site::new()?;
    let name = |pod: usize| format!("app{pod}");
    (0..PODS).try_for_each(|pod| site.account(&name(pod)))?;
    let agent = site.start()?;
    (0..PODS).try_for_each(|pod| site.bind(&name(pod), &name(pod)).map(drop))?;
    let calls = site.sts.wait_for_outcomes(PODS, PATIENCE)?;
    ensure!(calls.len() == PODS, "{}", calls.len());
    let failed = agent.metric("kirsa_exchange_seconds_count", &[("outcome", "token_forbidden")])?;
    ensure!(failed == 0.0, "{failed} pods would have to wait for what is remembered");
    agent.stop().context("after the burst")
}

/// Kubernetes 1.34 and later compare the account's UID, so no token is minted by terms of the former account.
#[test]
fn token_for_a_recreated_account_is_a_conflict() -> Result<()> {
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
