//! `kirsa doctor` with a real API server: missing, correct and excess rights.

use std::fs;
use std::future::Future;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use lab::agent::{Agent, Options};
use lab::apiserver::{ApiServer, ISSUER};
use lab::cni::Sandbox;
use lab::namespace::BASE;
use lab::net::Node;
use lab::poll::poll;
use lab::sts::{Config, Jwks, Keys, Provider, Role, StandIn};

use crate::report::{Report, doctor};

const TIMEOUT: Duration = Duration::from_secs(20);
const ARN: &str = "arn:aws:iam::111122223333:role/reader-role";

fn blocking<T>(call: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(call)
}

fn granted() -> Result<&'static ApiServer> {
    static GRANTED: OnceLock<Result<()>> = OnceLock::new();
    let api = ApiServer::get()?;
    let grant = || {
        for manifest in ["base/rbac.yaml", "components/constrained-impersonation/rbac.yaml"] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset").join(manifest);
            blocking(api.apply(&fs::read_to_string(path)?))?;
        }
        Ok(())
    };
    GRANTED.get_or_init(grant).as_ref().map_err(|error| anyhow!("{error:#}"))?;
    Ok(api)
}

struct Site {
    api: &'static ApiServer,
    node: Node,
    _sts: StandIn,
    sts: String,
}

impl Site {
    /// Creates a node with a pod of the service account `reader`, which has a role.
    fn new() -> Result<Self> {
        let (api, node) = (granted()?, Node::new()?);
        let jwks = Jwks {
            url: format!("{}/openid/v1/jwks", api.url()),
            authority: fs::read_to_string(api.ca())?,
            ..Jwks::default()
        };
        let providers = vec![Provider::new(ISSUER, Keys::Published(jwks))];
        let sts = StandIn::start(TcpListener::bind((BASE, 0))?, Config { providers, ..Config::default() })?;
        sts.set_role(Role::trusting(ARN, ISSUER, &lab::issuer::subject(node.name(), "reader")));
        blocking(api.node(node.name()))?;
        blocking(api.service_account(node.name(), "reader", &[("eks.amazonaws.com/role-arn", ARN)]))?;
        let uid = blocking(api.pod(node.name(), "reader-0", "reader", node.name()))?;
        let pod = node.pod("reader-0", lab::net::Shape::RoutedBare)?;
        node.cni_results()?.add(&Sandbox::new(node.name(), "reader-0", &uid), &pod)?;
        Ok(Self { api, node, sts: sts.url(), _sts: sts })
    }

    /// Returns options with the rights of this service account in the namespace `kirsa`.
    fn options(&self, account: &str) -> Result<Options> {
        Ok(self.options_with(&blocking(self.api.agent_kubeconfig("kirsa", account, self.node.name()))?))
    }

    fn options_with(&self, kubeconfig: &PathBuf) -> Options {
        let options = Options::new(env!("CARGO_BIN_EXE_kirsa"));
        options.flag("--kubeconfig", kubeconfig).flag("--sts-endpoint-url", &self.sts)
    }

    /// Retries until the API server applies the stored RBAC rules.
    fn doctor_until(&self, options: &Options, what: &str, wanted: impl Fn(&Report) -> bool) -> Result<Report> {
        let mut last = None;
        poll(what, TIMEOUT, || last.insert(doctor(&self.node, options)).as_ref().is_ok_and(&wanted).then_some(()))
            .with_context(|| format!("{last:#?}"))?;
        last.context("a report")?
    }
}

/// Binds a service account of the namespace `kirsa` to a role with these rules.
fn bind(api: &ApiServer, account: &str, name: &str, rules: &str) -> Result<()> {
    blocking(api.apply(&format!(
        "{{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRole, metadata: {{name: {name}}}, rules: {rules}}}"
    )))?;
    bind_role(api, account, name, name)
}

fn bind_role(api: &ApiServer, account: &str, name: &str, role: &str) -> Result<()> {
    blocking(api.apply(&format!(
        "{{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {{name: {name}}},
           roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: {role}}},
           subjects: [{{kind: ServiceAccount, name: {account}, namespace: kirsa}}]}}"
    )))
}

#[test]
fn healthy_node_passes() -> Result<()> {
    let site = Site::new()?;
    let options = site.options("kirsa")?;
    let agent = Agent::start(&site.node, &options)?;
    let report = doctor(&site.node, &options)?;
    for check in ["api-server", "clock-api-server", "minting", "rbac", "rbac-excess", "cni-records", "pods", "token"] {
        ensure!(report.verdicts(check) == ["ok"], "{check}: {report:#?}");
    }
    ensure!(report.one("minting")?.detail.contains("impersonating"), "{report:#?}");
    ensure!(report.verdicts("exchange") == ["ok"] && report.verdicts("issuer") == ["ok"], "{report:#?}");
    ensure!(report.one("cni-records")?.detail.contains("contains 1 records, the newest"), "{report:#?}");
    ensure!(report.code == 0, "{report:#?}");

    // Without an exchange, nothing proves that STS has the keys of an issuer that it cannot reach.
    let report = Report::of(Agent::doctor(&site.node, &options, &["--no-exchange", "--output", "json"])?)?;
    let issuer = report.one("issuer")?;
    ensure!(issuer.verdict == "warning" && issuer.fix.contains("--service-account-issuer"), "{issuer:?}");
    agent.stop()
}

#[test]
fn rights_of_both_minting_modes_warn() -> Result<()> {
    let site = Site::new()?;
    let direct = "[{apiGroups: [''], resources: [serviceaccounts], verbs: [get, list, watch]},
        {apiGroups: [''], resources: [pods], verbs: [list, watch]},
        {apiGroups: [''], resources: [serviceaccounts/token], verbs: [create]}]";
    bind(site.api, "direct", "direct", direct)?;
    let options = site.options("direct")?;
    let is_complete = |report: &Report| report.verdicts("rbac") == ["ok"] && report.verdicts("exchange") == ["ok"];
    let report = site.doctor_until(&options, "direct minting", is_complete)?;
    ensure!(
        report.one("minting")?.detail.starts_with("direct") && report.verdicts("rbac-excess") == ["ok"],
        "{report:#?}"
    );

    bind_role(site.api, "direct", "direct-impersonate", "kirsa-impersonate-node")?;
    let impersonating =
        |report: &Report| report.one("minting").is_ok_and(|finding| finding.detail.starts_with("impersonating"));
    let report =
        site.doctor_until(&options, "minting as the node", |report| impersonating(report) && is_complete(report))?;
    let excess = report.all("rbac-excess");
    ensure!(excess.iter().any(|finding| finding.fix.contains("components/direct-minting")), "{excess:#?}");
    Ok(())
}

#[test]
fn excess_rights_warn() -> Result<()> {
    let site = Site::new()?;
    for (role, rules) in [
        ("wide", "[{apiGroups: [''], resources: [secrets, pods/exec], verbs: [get, create]}]"),
        ("wide-odd", "[{apiGroups: [apps], resources: [deployments], verbs: [delete]}]"),
        ("wide-kirsa", "[{apiGroups: [''], resources: [serviceaccounts], verbs: [get, list, watch]}]"),
    ] {
        bind(site.api, "wide", role, rules)?;
    }
    bind_role(site.api, "wide", "wide-impersonate", "kirsa-impersonate-node")?;
    let options = site.options("wide")?;
    let report = site.doctor_until(&options, "excess rights", |report| {
        report.verdicts("rbac") == ["ok"] && report.all("rbac-excess").len() == 3
    })?;
    let excess = report.all("rbac-excess");
    ensure!(excess.iter().all(|finding| finding.verdict == "warning"), "{excess:#?}");
    ensure!(excess.iter().any(|finding| finding.fix.contains("the rule with get secrets")), "{excess:#?}");
    ensure!(excess.iter().any(|finding| finding.detail.contains("create pods/exec")), "{excess:#?}");
    ensure!(excess.iter().any(|finding| finding.detail.contains("delete deployments.apps")), "{excess:#?}");

    bind(site.api, "wide", "wide-all", "[{apiGroups: ['*'], resources: ['*'], verbs: ['*']}]")?;
    site.doctor_until(&options, "all rights", |report| {
        report.one("rbac-excess").is_ok_and(|finding| finding.detail.contains("everything"))
    })?;
    Ok(())
}

#[test]
fn missing_rights_fail() -> Result<()> {
    let site = Site::new()?;
    let report = doctor(&site.node, &site.options("powerless")?)?;
    ensure!(report.code == 1 && report.failed("minting")?.detail.contains("constrained-impersonation"), "{report:#?}");
    let rbac = report.failed("rbac")?;
    ensure!(rbac.detail.contains("watch serviceaccounts") && rbac.fix.contains("base/rbac.yaml"), "{rbac:?}");
    ensure!(report.verdicts("token") == ["skipped"] && report.verdicts("sts") == ["ok"], "{report:#?}");
    Ok(())
}

#[test]
fn unreachable_api_server_fails() -> Result<()> {
    let site = Site::new()?;
    let good = blocking(site.api.agent_kubeconfig("kirsa", "kirsa", site.node.name()))?;
    let unreachable = site.node.state().join("unreachable.kubeconfig");
    fs::write(&unreachable, fs::read_to_string(good)?.replace(":6443", ":1"))?;
    let report = doctor(&site.node, &site.options_with(&unreachable))?;
    let finding = report.failed("api-server")?;
    ensure!(report.code == 1 && finding.detail.contains("refused"), "{finding:?}");
    ensure!(report.verdicts("rbac").is_empty() && report.verdicts("sts") == ["ok"], "{report:#?}");
    Ok(())
}
