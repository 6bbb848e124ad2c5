//! The cluster that is driven: its machines, its API server, its stand-ins.

use std::{
    cell::Cell,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail, ensure};
use kube::Client;
use lab::sts::{Call, Fault, Role};
use serde_json::{Value, json};

use crate::{control, pods::Pods};

const STS: &str = "127.0.0.1:9912";
const CANARY: &str = "127.0.0.1:9913";
const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
const ACCOUNT: &str = "111122223333";
const HOLD: &str = "kirsa.dev/e2e";
const SCRIPT_SECONDS: &str = "240";
/// Where the scenarios' own objects live.
pub const NAMESPACE: &str = "e2e";

pub struct Cluster {
    pub state: PathBuf,
    scripts: PathBuf,
    runtime: tokio::runtime::Runtime,
    pub client: Client,
    pub pods: Pods,
    /// Hits of the canary that a scenario brought about on purpose.
    excused: Cell<usize>,
}

impl Cluster {
    pub fn open(state: &Path) -> anyhow::Result<Self> {
        let kubeconfig = state.join("admin.kubeconfig");
        ensure!(kubeconfig.exists(), "no cluster in {}: tests/cluster/up.sh starts one", state.display());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(lab::apiserver::client_of(&kubeconfig))?;
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cluster");
        let cluster = Self {
            state: state.to_owned(),
            scripts: fs::canonicalize(scripts)?,
            runtime,
            client,
            pods: Pods::watch(kubeconfig, NAMESPACE),
            excused: Cell::new(0),
        };
        cluster.apply(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } }))?;
        Ok(cluster)
    }

    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// A command in a machine; its standard output.
    pub fn on(&self, machine: &str, command: &[&str]) -> anyhow::Result<String> {
        self.script("enter.sh", &[&[machine], command].concat())
    }

    pub fn kubectl(&self, args: &[&str]) -> anyhow::Result<String> {
        self.script("enter.sh", &[&["kubectl"], args].concat())
    }

    pub fn apply(&self, object: &Value) -> anyhow::Result<()> {
        let file = self.state.join("object.json");
        fs::write(&file, object.to_string())?;
        self.kubectl(&["apply", "-f", &file.display().to_string()]).map(drop)
    }

    /// A script of `tests/cluster`.
    pub fn script(&self, name: &str, args: &[&str]) -> anyhow::Result<String> {
        self.script_with(name, args, &[])
    }

    /// The same with variables of its environment.
    pub fn script_with(&self, name: &str, args: &[&str], variables: &[(&str, &str)]) -> anyhow::Result<String> {
        // None of them may wait for ever for a node that is gone.
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", SCRIPT_SECONDS]).arg(self.scripts.join(name));
        command.args(args).env("KIRSA_CLUSTER", &self.state).envs(variables.iter().copied());
        let output = command.output().with_context(|| name.to_owned())?;
        let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "{name} {}: {}: {error}{out}", args.join(" "), output.status);
        Ok(out.into_owned())
    }

    /// Whether it has IPv6 beside IPv4.
    pub fn dual_stack(&self) -> anyhow::Result<bool> {
        Ok(fs::read_to_string(self.state.join("settings"))?.lines().any(|line| line == "dual=yes"))
    }

    /// The folder of the repository that the scripts are in.
    pub fn manifests(&self, folder: &str) -> String {
        self.scripts.join("../..").join(folder).display().to_string()
    }

    /// A file of a node's disk, as this process sees it.
    pub fn disk(&self, node: &str, path: &str) -> PathBuf {
        self.state.join(node).join("disk").join(path.trim_start_matches('/'))
    }

    /// The log of a program of a machine.
    pub fn log(&self, machine: &str, program: &str) -> String {
        self.state.join(machine).join("log").join(program).with_extension("log").display().to_string()
    }

    /// While the redirect is not there on purpose, pods do reach the metadata service.
    pub fn excuse_leaks(&self) -> anyhow::Result<()> {
        self.excused.set(self.leaks()?.len());
        Ok(())
    }

    /// Those that should not have.
    pub fn new_leaks(&self) -> anyhow::Result<Vec<Value>> {
        let mut hits = self.leaks()?;
        Ok(hits.split_off(self.excused.get()))
    }

    /// Requests of pods that reached the metadata service outside the node.
    pub fn leaks(&self) -> anyhow::Result<Vec<Value>> {
        let of_pod = |hit: &Value| {
            let from = hit["from"].as_str().unwrap_or_default();
            ["10.244.", "[fd00:244:"].iter().any(|pods| from.starts_with(pods))
        };
        Ok(self.hits()?.into_iter().filter(of_pod).collect())
    }

    /// Requests that reached it at all: the nodes themselves may.
    pub fn hits(&self) -> anyhow::Result<Vec<Value>> {
        match control::call(CANARY, "GET", "/hits", None)? {
            Value::Array(hits) => Ok(hits),
            other => bail!("the canary says {other}"),
        }
    }

    pub fn role_arn(name: &str) -> String {
        format!("arn:aws:iam::{ACCOUNT}:role/{name}")
    }

    /// Service accounts, each annotated with a role of its own that trusts it and nobody else.
    pub fn identities(&self, names: &[String]) -> anyhow::Result<()> {
        let mut accounts = Vec::new();
        for name in names {
            let arn = Self::role_arn(name);
            let role = Role::trusting(&arn, ISSUER, &format!("system:serviceaccount:{NAMESPACE}:{name}"));
            control::call(STS, "PUT", "/_control/roles", Some(&serde_json::to_value(role)?))?;
            accounts.push(json!({
                "apiVersion": "v1", "kind": "ServiceAccount",
                "metadata": {
                    "name": name, "namespace": NAMESPACE,
                    "annotations": { "eks.amazonaws.com/role-arn": arn }
                }
            }));
        }
        self.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": accounts }))
    }

    pub fn sts_takes(&self, delay: Duration) -> anyhow::Result<()> {
        control::call(STS, "DELETE", "/_control/faults", None)?;
        let fault = Fault::always(lab::sts::Effect::delay(delay));
        control::call(STS, "POST", "/_control/faults", Some(&serde_json::to_value(fault)?)).map(drop)
    }

    pub fn sts_calls(&self) -> anyhow::Result<Vec<Call>> {
        Ok(serde_json::from_value(control::call(STS, "GET", "/_control/calls", None)?)?)
    }

    pub fn forget_sts_calls(&self) -> anyhow::Result<()> {
        control::call(STS, "DELETE", "/_control/calls", None).map(drop)
    }

    /// The role that each access key was issued for.
    pub fn issued(&self) -> anyhow::Result<std::collections::HashMap<String, String>> {
        let Value::Array(sessions) = control::call(STS, "GET", "/_control/sessions", None)? else {
            bail!("the STS stand-in lists no sessions");
        };
        let text = |session: &Value, key: &str| session[key].as_str().unwrap_or_default().to_owned();
        Ok(sessions.iter().map(|session| (text(session, "access_key_id"), text(session, "role_arn"))).collect())
    }

    /// Asks until there is an answer.
    pub fn until<T>(
        &self,
        what: &str,
        within: Duration,
        mut ask: impl FnMut() -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + within;
        loop {
            match ask() {
                Ok(Some(answer)) => return Ok(answer),
                Ok(None) if Instant::now() > deadline => bail!("not within {within:?}: {what}"),
                Err(error) if Instant::now() > deadline => return Err(error.context(what.to_owned())),
                Ok(None) | Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Keeps the agent away from every node that is not labelled by [`Cluster::admit_agent`].
    pub fn hold_agent(&self) -> anyhow::Result<()> {
        let hold = json!({ "spec": { "template": { "spec": { "nodeSelector": { HOLD: "admitted" } } } } }).to_string();
        self.kubectl(&["-n", "kirsa", "patch", "daemonset", "kirsa", "-p", &hold]).map(drop)
    }

    pub fn admit_agent(&self, node: &str) -> anyhow::Result<()> {
        self.kubectl(&["label", "node", node, &format!("{HOLD}=admitted"), "--overwrite"]).map(drop)
    }

    /// The DaemonSet as it was before [`Cluster::hold_agent`].
    pub fn release_agent(&self, node: &str) -> anyhow::Result<()> {
        let release = json!({ "spec": { "template": { "spec": { "nodeSelector": null } } } }).to_string();
        self.kubectl(&["-n", "kirsa", "patch", "daemonset", "kirsa", "-p", &release])?;
        self.kubectl(&["label", "node", node, &format!("{HOLD}-")]).map(drop)
    }

    /// Until every node has a Ready agent of the current version.
    pub fn agent_ready(&self) -> anyhow::Result<()> {
        self.kubectl(&["-n", "kirsa", "rollout", "status", "daemonset/kirsa", "--timeout=180s"]).map(drop)
    }

    /// The agent's pod on a node.
    pub fn agent_pod(&self, node: &str) -> anyhow::Result<Value> {
        self.agent_pods(node)?.into_iter().next().with_context(|| format!("no agent on {node}"))
    }

    /// Two while one agent takes over from the other; without those that are on their way out.
    pub fn agent_pods(&self, node: &str) -> anyhow::Result<Vec<Value>> {
        let selector = format!("--field-selector=spec.nodeName={node}");
        let of_agents = ["-l", "app.kubernetes.io/name=kirsa", "-o", "json"];
        let pods = self.kubectl(&[&["-n", "kirsa", "get", "pods", &selector], &of_agents[..]].concat())?;
        let Value::Array(mut pods) = serde_json::from_str::<Value>(&pods)?["items"].take() else {
            bail!("no list of pods")
        };
        pods.retain(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        Ok(pods)
    }
}

/// Seconds since 1970, for comparing with what pods and stand-ins say.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
