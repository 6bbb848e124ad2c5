//! What both are measured in: a real API server full of large pods, an STS, and two nodes with the same redirect, one of
//! the agent and one of bare hyper.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::stream::{self, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod as KubePod;
use kube::api::{Api, Patch, PatchParams, PostParams};
use lab::agent::{Agent, Options};
use lab::apiserver::{ApiServer, ISSUER};
use lab::http::CREDENTIALS_PATH;
use lab::namespace::BASE;
use lab::net::{Node, Pod, Shape};
use lab::poll::poll;
use lab::process::Process;
use lab::sts::{Config, Keys, Provider, Role, StandIn};
use serde_json::json;
use tokio::runtime::Runtime;

use crate::binaries::Binaries;

pub(crate) const PODS: usize = 250;
/// In bytes; most of it annotations, as operators leave them.
pub(crate) const POD_SIZE: usize = 24_000;
/// The service accounts that these pods share, each with a role.
const ACCOUNTS: usize = 50;
/// The service account, role and pod that the warm load is for.
pub(crate) const WARM: &str = "warm";
const COLD: &str = "cold";
const NAMESPACE: &str = "bench";
const ROLE_ARN: &str = "eks.amazonaws.com/role-arn";
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Site<'a> {
    pub(crate) node: Node,
    pub(crate) warm_pod: Pod,
    pub(crate) cold_pod: Pod,
    pub(crate) options: Options,
    pub(crate) sts: StandIn,
    binaries: &'a Binaries,
    runtime: Runtime,
    api: &'static ApiServer,
}

/// Bare hyper on a node of its own.
pub(crate) struct Bare {
    pub(crate) process: Process,
    pub(crate) pod: Pod,
    _node: Node,
}

impl<'a> Site<'a> {
    pub(crate) fn new(binaries: &'a Binaries) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let api = ApiServer::get()?;
        let node = Node::new()?;
        let (warm_pod, cold_pod) = (node.pod(WARM, Shape::RoutedBare)?, node.pod(COLD, Shape::RoutedBare)?);
        runtime.block_on(async {
            let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
            api.namespace("kirsa").await?;
            for rights in ["base/rbac.yaml", "components/constrained-impersonation/rbac.yaml"] {
                let path = repository.join("daemonset").join(rights);
                api.apply(&fs::read_to_string(&path).with_context(|| path.display().to_string())?).await?;
            }
            as_in_a_pod(api, &api.agent_kubeconfig("kirsa", "kirsa", node.name()).await?)
        })?;
        let keys = Keys::Given(serde_json::from_value(runtime.block_on(api.jwks())?)?);
        let config = Config { providers: vec![Provider::new(ISSUER, keys)], ..Config::default() };
        let sts = StandIn::start(TcpListener::bind((BASE, 0))?, config)?;
        let options = Options::new(&binaries.kirsa)
            .env("KUBERNETES_SERVICE_HOST", api.address().ip().to_string())
            .env("KUBERNETES_SERVICE_PORT", api.address().port().to_string())
            .flag("--sts-endpoint-url", sts.url())
            // One pod makes all the load; what it may is not what is measured.
            .flag("--max-requests-per-source", "1000000");
        let site = Self { node, warm_pod, cold_pod, options, sts, binaries, runtime, api };
        site.runtime.block_on(site.fill())?;
        Ok(site)
    }

    /// A node's worth of pods, those with network namespaces among them.
    async fn fill(&self) -> Result<()> {
        let others: Vec<String> = (0..ACCOUNTS - 1).map(|number| format!("account-{number}")).collect();
        for account in others.iter().map(String::as_str).chain([WARM]) {
            self.annotate(account, account).await?;
        }
        // Its role comes later, so that it is not fetched ahead.
        self.api.service_account(NAMESPACE, COLD, &[]).await?;
        let live = [(WARM, &self.warm_pod), (COLD, &self.cold_pod)]
            .map(|(name, pod)| (name.to_owned(), name, IpAddr::V4(pod.ip())));
        let others = (live.len()..PODS).map(|number| {
            let [high, low] = u16::try_from(number).expect("a node's worth of pods").to_be_bytes();
            let account = others[number % others.len()].as_str();
            (format!("pod-{number}"), account, IpAddr::V4(Ipv4Addr::new(10, 99, high, low)))
        });
        let api: Api<KubePod> = Api::namespaced(self.api.client().await?, NAMESPACE);
        let pods = live
            .into_iter()
            .chain(others)
            .map(|(name, account, address)| create(&api, name, account, self.node.name(), address));
        stream::iter(pods).buffer_unordered(8).try_collect::<()>().await
    }

    /// Gives a service account a role of that name, which it may assume.
    async fn annotate(&self, account: &str, role: &str) -> Result<()> {
        let arn = self.arn(role);
        self.sts.set_role(Role::trusting(&arn, ISSUER, &lab::issuer::subject(NAMESPACE, account)));
        self.api.service_account(NAMESPACE, account, &[(ROLE_ARN, &arn)]).await
    }

    pub(crate) fn set_cold_role(&self, role: &str) -> Result<()> {
        self.runtime.block_on(self.annotate(COLD, role))
    }

    pub(crate) fn arn(&self, role: &str) -> String {
        format!("arn:aws:iam::111122223333:role/{role}")
    }

    /// Until the agent has fetched ahead what it is going to.
    pub(crate) fn wait_for_sessions(&self, agent: &Agent) -> Result<()> {
        let fetched = || agent.metric("kirsa_exchange_seconds_count", &[("step", "sts"), ("outcome", "ok")]);
        poll("a session for each role", PATIENCE, || (fetched().ok()? >= ACCOUNTS as f64).then_some(()))
    }

    /// TokenRequests by the API server's own count.
    pub(crate) fn token_requests(&self) -> Result<u64> {
        let metrics = self.runtime.block_on(async {
            let request = http::Request::get("/metrics").body(Vec::new())?;
            anyhow::Ok(self.api.client().await?.request_text(request).await?)
        })?;
        let requests = metrics
            .lines()
            .filter(|line| line.starts_with("apiserver_request_total{") && line.contains("subresource=\"token\""));
        requests.map(|line| Ok(line.rsplit(' ').next().unwrap_or_default().parse::<f64>()? as u64)).sum()
    }

    /// Bare hyper, behind the rules that the agent has set here but for the node's addresses, with the agent's answer.
    pub(crate) fn start_bare(&self) -> Result<Bare> {
        let node = Node::new()?;
        let pod = node.pod(WARM, Shape::RoutedBare)?;
        let mut rules = self.node.netns().shell("nft list table inet kirsa")?;
        for (here, there) in self.node.host_ips().iter().zip(node.host_ips()) {
            let replaced = rules.replace(&here.to_string(), &there.to_string());
            ensure!(rules != replaced, "no rule leads to {here}:\n{rules}");
            rules = replaced;
        }
        let (table, body) = (node.state().join("table.nft"), node.state().join("credentials.json"));
        fs::write(&table, rules)?;
        node.netns().shell(&format!("nft -f {}", table.display()))?;
        let mut imds = self.warm_pod.imds();
        fs::write(&body, imds.get(&format!("{CREDENTIALS_PATH}{WARM}")).send()?.ok()?)?;
        let mut command = Command::new(&self.binaries.bare_hyper);
        command.arg("--listen").arg(format!("{}:338", node.host_ip())).arg("--body").arg(body);
        let process = Process::spawn(Some(node.netns()), "bare-hyper", command)?;
        poll("bare hyper", PATIENCE, || pod.imds().get("/").send().ok())?;
        Ok(Bare { process, pod, _node: node })
    }
}

/// The agent finds the API server as it does in a cluster: reading a kubeconfig would cost memory that it does not take
/// there.
fn as_in_a_pod(api: &ApiServer, kubeconfig: &Path) -> Result<()> {
    let kubeconfig: serde_json::Value = serde_json::from_slice(&fs::read(kubeconfig)?)?;
    let token = kubeconfig["users"][0]["user"]["token"].as_str().context("a token in the agent's kubeconfig")?;
    // On a /run of the lab's own.
    let account = Path::new("/run/secrets/kubernetes.io/serviceaccount");
    fs::create_dir_all(account)?;
    fs::copy(api.ca(), account.join("ca.crt"))?;
    fs::write(account.join("token"), token)?;
    fs::write(account.join("namespace"), "kirsa")?;
    Ok(())
}

async fn create(api: &Api<KubePod>, name: String, account: &str, node: &str, address: IpAddr) -> Result<()> {
    let padding = "x".repeat(POD_SIZE);
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "annotations": {"bench/padding": padding}},
        "spec": {"serviceAccountName": account, "nodeName": node, "containers": [{"name": "main", "image": "none"}]},
    });
    api.create(&PostParams::default(), &serde_json::from_value(pod)?).await.with_context(|| name.clone())?;
    let status = json!({"status": {"phase": "Running", "podIP": address, "podIPs": [{ "ip": address }]}});
    api.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await?;
    Ok(())
}
