//! What most tests of the agent start from: a node whose pods have roles, an STS that trusts their tokens, and the
//! node's own metadata service, which no pod may ever reach. Without Kubernetes: the agent reads its pods from a file.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::agent::{Agent, Options};
use crate::imds::{Canary, Hit, Instance};
use crate::issuer::{self, Issuer};
use crate::namespace::BASE;
use crate::net::{Node, Pod, Shape};
use crate::poll::poll;
use crate::sts::{Call, Config, Keys, Provider, Role, Session, StandIn};
use crate::workloads::{self, Workload};

/// The account of every role.
pub const ACCOUNT: &str = "111122223333";
const TOKEN_PATH: &str = "/latest/api/token";
const ISSUER: &str = "https://issuer.example";
/// What an agent reads of the node's own metadata by itself, unless a flag says otherwise.
const NODE_METADATA: [&str; 11] = [
    "/latest/dynamic/instance-identity/document",
    "/latest/meta-data/ami-id",
    "/latest/meta-data/hostname",
    "/latest/meta-data/instance-id",
    "/latest/meta-data/instance-type",
    "/latest/meta-data/local-hostname",
    "/latest/meta-data/placement/availability-zone",
    "/latest/meta-data/placement/availability-zone-id",
    "/latest/meta-data/placement/region",
    "/latest/meta-data/services/domain",
    "/latest/meta-data/services/partition",
];
/// Longer than the agent takes to read the workloads file.
const PATIENCE: Duration = Duration::from_secs(20);

/// Paths and folders that an agent polls for the groups `vpc`, `tags` and `lifecycle`.
pub const POLLED_BY_GROUPS: [&str; 9] = [
    "/latest/meta-data/autoscaling/target-lifecycle-state",
    "/latest/meta-data/block-device-mapping/",
    "/latest/meta-data/events/",
    "/latest/meta-data/instance-life-cycle",
    "/latest/meta-data/mac",
    "/latest/meta-data/network/interfaces/macs/",
    "/latest/meta-data/outpost-arn",
    "/latest/meta-data/spot/",
    "/latest/meta-data/tags/instance/",
];

#[derive(Debug)]
pub struct Site {
    pub node: Node,
    pub issuer: Issuer,
    pub sts: StandIn,
    /// To start an agent with; a test adds its own flags.
    pub options: Options,
    /// The paths that its agents may read at the node's own metadata service; a test that allows others says so here.
    pub node_metadata: Vec<&'static str>,
    /// Paths that its agents poll there; a folder ends with a slash. A test that allows groups sets [`POLLED_BY_GROUPS`].
    pub polled: Vec<&'static str>,
    canaries: Vec<Canary>,
    entries: Mutex<Vec<Workload>>,
}

impl Site {
    /// `binary` is the agent: `env!("CARGO_BIN_EXE_kirsa")` in a test.
    pub fn new(binary: impl Into<PathBuf>) -> Result<Self> {
        let node = Node::new()?;
        let listeners = [node.listen_metadata()?].into_iter().chain(node.listen_metadata6()?);
        let canaries = listeners.map(|listener| Canary::start(listener, Instance::default())).collect::<Result<_>>()?;
        let issuer = Issuer::with_elliptic_curve(ISSUER)?;
        let providers = vec![Provider::new(issuer.url(), Keys::Given(issuer.jwks()?))];
        let sts = StandIn::start(TcpListener::bind((BASE, 0))?, Config { providers, ..Config::default() })?;
        let file = node.state().join("workloads.yaml");
        let options = Options::new(binary).flag("--workloads", &file).flag("--sts-endpoint-url", sts.url());
        let node_metadata = NODE_METADATA.to_vec();
        let (polled, entries) = (Vec::new(), Mutex::default());
        let site = Self { node, issuer, sts, options, node_metadata, polled, canaries, entries };
        site.write()?;
        Ok(site)
    }

    /// A pod that the agent does not know.
    pub fn stranger(&self, name: &str) -> Result<Pod> {
        self.node.pod(name, Shape::RoutedBare)
    }

    /// A pod without a role.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        let pod = self.stranger(name)?;
        self.put(Workload::new(&pod, name))?;
        Ok(pod)
    }

    /// Gives a role to a pod that the agent knows to have none, and waits until it knows better. Nothing is fetched
    /// ahead for such a pod: what STS hears first of it is its own first request for credentials.
    pub fn give_role(&self, pod: &Pod) -> Result<()> {
        self.put(self.with_role(pod)?)?;
        // Which takes the role, and no credentials.
        let known = || pod.imds().get("/latest/meta-data/iam/info").send();
        poll("the role to be known", PATIENCE, || known().ok().filter(|info| info.status == 200))?;
        Ok(())
    }

    /// A pod whose service account, of the same name, has a role of its own.
    pub fn pod_with_role(&self, name: &str) -> Result<Pod> {
        let pod = self.stranger(name)?;
        self.put(self.with_role(&pod)?)?;
        Ok(pod)
    }

    /// The entry of a pod whose service account, of the same name, has a role of its own, which STS lets it assume.
    pub fn with_role(&self, pod: &Pod) -> Result<Workload> {
        let (name, arn) = (pod.name(), self.arn(pod.name()));
        self.trust(&arn, name);
        let token = self.issuer.pod_token("default", name, name, name)?;
        Ok(Workload::new(pod, name).role(&arn, &self.write_token(name, &token)?))
    }

    /// Lets a service account assume a role.
    pub fn trust(&self, arn: &str, service_account: &str) {
        let subject = issuer::subject("default", service_account);
        self.sts.set_role(Role::trusting(arn, self.issuer.url(), &subject).max_session_duration(43_200));
    }

    /// Puts a token where the pod of that name has it; the path, for a workload's `tokenFile`.
    pub fn write_token(&self, name: &str, token: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.node.state().join(format!("{name}.jwt"));
        fs::write(&path, token).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// The role of the pods that [`Site::with_role`] gives one.
    pub fn arn(&self, name: &str) -> String {
        format!("arn:aws:iam::{ACCOUNT}:role/{name}-role")
    }

    /// The workloads file gets this entry, in place of the one that its pod has had.
    pub fn put(&self, workload: Workload) -> Result<()> {
        self.entries().retain(|known| known.pod != workload.pod);
        self.entries().push(workload);
        self.write()
    }

    /// The workloads file loses the pod's entry.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.entries().retain(|known| known.pod != name);
        self.write()
    }

    /// Where the workloads file is.
    pub fn workloads(&self) -> PathBuf {
        self.node.state().join("workloads.yaml")
    }

    /// Writes the workloads file as it should be.
    pub fn write(&self) -> Result<()> {
        workloads::write(&self.workloads(), &self.entries())
    }

    pub fn start(&self) -> Result<Agent> {
        Agent::start(&self.node, &self.options)
    }

    /// What STS was asked for the role that [`Site::with_role`] gave.
    pub fn calls(&self, name: &str) -> Vec<Call> {
        self.sts.calls_for(&self.arn(name))
    }

    /// Whose session a document of credentials opens.
    pub fn session(&self, document: &str) -> Result<Session> {
        let document: serde_json::Value = serde_json::from_str(document).with_context(|| document.to_owned())?;
        let key = document["AccessKeyId"].as_str().context("an access key id")?;
        self.sts.session(key).with_context(|| format!("STS issued no {key}"))
    }

    /// Sets what the node's own metadata service has at a path, or that it has nothing there.
    pub fn set_node_metadata(&self, path: &str, document: Option<&str>) {
        self.canaries.iter().for_each(|canary| canary.set(path, document));
    }

    /// What came to the node's own metadata service.
    pub fn hits(&self) -> Vec<Hit> {
        self.canaries.iter().flat_map(Canary::hits).collect()
    }

    /// The agent's requests come from the node's addresses, so what it passes on for a pod would too. By itself it
    /// asks for a session token, and then once for each path that it may read, or more often where it polls; anything
    /// else was somebody's request.
    pub fn no_pod_got_outside(&self) -> Result<()> {
        let hits = self.hits();
        let count =
            |method: &str, path: &str| hits.iter().filter(|hit| hit.method == method && hit.path == path).count();
        let readings = count("PUT", TOKEN_PATH);
        let polled =
            |path: &str| self.polled.iter().any(|own| *own == path || (own.ends_with('/') && path.starts_with(own)));
        for hit in &hits {
            let own = match hit.method.as_str() {
                "PUT" => hit.path == TOKEN_PATH,
                "GET" if polled(&hit.path) => true,
                "GET" => self.node_metadata.contains(&hit.path.as_str()) && count("GET", &hit.path) <= readings,
                _ => false,
            };
            let by_node = self.node.host_ips().contains(&hit.from.ip());
            ensure!(by_node && own, "this reached the node's own metadata service: {hit:?}, of {hits:#?}");
        }
        Ok(())
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Workload>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
