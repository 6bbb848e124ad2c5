//! Tests the chart on a cluster: the real helm installs, upgrades and uninstalls it.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use kube::Api;
use lab::apiserver::ApiServer;

use crate::{chart, output_of};

/// A namespace that no other test uses.
const NAMESPACE: &str = "release";

struct Helm {
    kubeconfig: String,
}

impl Helm {
    fn run(&self, verb: &str, more: &[&str]) -> Result<String> {
        let mut arguments = vec![verb, "kirsa"];
        let chart = chart::path();
        if verb != "uninstall" && verb != "rollback" {
            arguments.push(&chart);
        }
        arguments.extend(["--kubeconfig", &self.kubeconfig, "--namespace", NAMESPACE]);
        arguments.extend(more);
        output_of("helm", &arguments)
    }
}

async fn roles(client: &kube::Client) -> Result<Vec<String>> {
    let roles = Api::<ClusterRole>::all(client.clone()).list(&Default::default()).await?;
    let names = roles.items.into_iter().filter_map(|role| role.metadata.name);
    Ok(names.filter(|name| name.starts_with("kirsa-")).collect())
}

#[tokio::test]
async fn release_installs_upgrades_and_uninstalls() -> Result<()> {
    let server = ApiServer::get()?;
    let client = server.client().await?;
    let helm = Helm { kubeconfig: server.admin_kubeconfig().display().to_string() };

    let notes = helm.run("install", &["--create-namespace", "--take-ownership"])?;
    ensure!(notes.contains(&format!("kubectl -n {NAMESPACE} rollout status daemonset/kirsa")), "{notes}");
    let namespaces = Api::<Namespace>::all(client.clone());
    let labels = namespaces.get(NAMESPACE).await?.metadata.labels.context("labels")?;
    assert_eq!(labels["pod-security.kubernetes.io/enforce"], "privileged");
    let impersonation = ["kirsa-audience", "kirsa-impersonate-node", "kirsa-serviceaccounts"];
    assert_eq!(roles(&client).await?, impersonation);
    let binding = Api::<ClusterRoleBinding>::all(client.clone()).get("kirsa-impersonate-node").await?;
    let subject = &binding.subjects.context("subjects")?[0];
    assert_eq!(subject.namespace.as_deref(), Some(NAMESPACE), "the binding grants the right to this release's agent");
    let checksum = checksum(server).await?;

    helm.run("upgrade", &["--set", "minting=direct,startupTaint=true,agent.logLevel=debug"])?;
    assert_eq!(roles(&client).await?, ["kirsa-mint", "kirsa-serviceaccounts", "kirsa-startup-taint"]);
    let flags: ConfigMap = server.read(NAMESPACE, "kirsa").await?.context("the flags")?;
    assert_eq!(flags.data.context("data")?["KIRSA_LOG_LEVEL"], "debug");
    ensure!(self::checksum(server).await? != checksum, "changed flags do not restart the agents");

    helm.run("rollback", &["1"])?;
    assert_eq!(roles(&client).await?, impersonation);
    assert_eq!(self::checksum(server).await?, checksum);

    helm.run("uninstall", &[])?;
    assert_eq!(roles(&client).await?, [""; 0]);
    ensure!(server.read::<DaemonSet>(NAMESPACE, "kirsa").await?.is_none());
    ensure!(namespaces.get(NAMESPACE).await?.metadata.deletion_timestamp.is_none(), "the namespace stays");
    Ok(())
}

/// Returns the annotation whose change restarts the agents.
async fn checksum(server: &ApiServer) -> Result<String> {
    let daemonset: DaemonSet = server.read(NAMESPACE, "kirsa").await?.context("the DaemonSet")?;
    let annotations = daemonset.spec.context("its spec")?.template.metadata.and_then(|metadata| metadata.annotations);
    annotations.context("annotations")?.remove("kirsa.dev/config").context("the checksum")
}
