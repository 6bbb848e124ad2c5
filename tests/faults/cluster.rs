//! An API server that a test may stop, with a node, and an agent with the rights of the manifests.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use kirsa::kubernetes::{MintMode, MintPermissions};
use lab::agent::{Agent, Options};
use lab::apiserver::{ApiServer, ISSUER, client_of};
use lab::issuer::subject;
use lab::namespace::BASE;
use lab::net::{Node, Pod, Shape};
use lab::poll::{poll, poll_every};
use lab::sts::{Config, Effect, Fault, Keys, Provider, Role, StandIn};
use serde_json::Value;
use tokio::runtime::Runtime;

use super::proxy::Proxy;
use super::{INTERVAL, LIFETIME, TIMEOUT, list};

const ROLE_ARN: &str = "eks.amazonaws.com/role-arn";
/// Namespace of the pods.
const NAMESPACE: &str = "apps";
const RIGHTS: &str = "components/constrained-impersonation/rbac.yaml";

pub(super) struct Cluster {
    pub(super) api: ApiServer,
    pub(super) node: Node,
    pub(super) sts: StandIn,
    kubeconfig: PathBuf,
    options: Options,
    runtime: Runtime,
}

impl Cluster {
    pub(super) fn new() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (api, node) = (ApiServer::another()?, Node::new()?);
        let kubeconfig = runtime.block_on(async {
            api.namespace("kirsa").await?;
            api.apply(&manifest("base/rbac.yaml")?).await?;
            api.apply(&manifest(RIGHTS)?).await?;
            api.agent_kubeconfig("kirsa", "kirsa", node.name()).await
        })?;
        let keys = Keys::Given(serde_json::from_value(runtime.block_on(api.jwks())?)?);
        let config = Config { providers: vec![Provider::new(ISSUER, keys)], ..Config::default() };
        let sts = StandIn::start(TcpListener::bind((BASE, 0))?, config)?;
        sts.configure(|settings| settings.session_seconds = Some(LIFETIME));
        let options = Options::new(env!("CARGO_BIN_EXE_kirsa")).flag("--sts-endpoint-url", sts.url());
        let cluster = Self { api, node, sts, kubeconfig, options, runtime };
        let client = cluster.runtime.block_on(client_of(&cluster.kubeconfig))?;
        poll("the rights", TIMEOUT, || {
            let granted = cluster.runtime.block_on(MintPermissions::query(&client)).ok()?;
            granted.identity(MintMode::Impersonation).ok()
        })?;
        Ok(cluster)
    }

    pub(super) fn start(&self) -> Result<Agent> {
        Agent::start(&self.node, &self.options.clone().flag("--kubeconfig", &self.kubeconfig))
    }

    /// Starts an agent that reaches the API server through a proxy.
    pub(super) fn start_behind_proxy(&self) -> Result<(Agent, Proxy)> {
        let proxy = Proxy::start(self.api.address())?;
        let text = fs::read_to_string(&self.kubeconfig)?;
        let kubeconfig = self.node.state().join("kubeconfig");
        fs::write(&kubeconfig, text.replace(&self.api.address().to_string(), &proxy.address().to_string()))?;
        Ok((Agent::start(&self.node, &self.options.clone().flag("--kubeconfig", kubeconfig))?, proxy))
    }

    /// Starts a pod with a service account of the same name that has no role.
    pub(super) fn pod(&self, name: &str) -> Result<Pod> {
        self.runtime.block_on(async {
            self.api.service_account(NAMESPACE, name, &[]).await?;
            self.api.pod(NAMESPACE, name, name, self.node.name()).await
        })?;
        let pod = self.node.pod(name, Shape::RoutedBare)?;
        let ips = pod.address().ips();
        let shown = self.api.set_pod_status(NAMESPACE, name, "Running", &ips);
        self.runtime.block_on(shown)?;
        Ok(pod)
    }

    /// Makes STS throttle calls for the pod's role.
    pub(super) fn throttle(&self, pod: &Pod) {
        self.sts.inject(Fault::always(Effect::error("Throttling")).of_role(&arn(pod.name())));
    }

    /// Annotates the pod's service account with a role, and waits until the agent knows it.
    pub(super) fn give_role(&self, pod: &Pod) -> Result<()> {
        let (name, arn) = (pod.name(), arn(pod.name()));
        poll_every(INTERVAL, "the pod to be known", TIMEOUT, || list(pod).ok().filter(|list| list.status == 404))?;
        self.sts.set_role(Role::trusting(&arn, ISSUER, &subject(NAMESPACE, name)));
        self.runtime.block_on(self.api.service_account(NAMESPACE, name, &[(ROLE_ARN, &arn)]))?;
        // This request needs the role, but no credentials.
        let known = || pod.imds().get("/latest/meta-data/iam/info").send();
        poll("the role to be known", TIMEOUT, || known().ok().filter(|info| info.status == 200))?;
        Ok(())
    }

    /// Revokes the right to mint tokens, and no other right.
    pub(super) fn forbid_tokens(&self) -> Result<()> {
        let mut objects: Vec<Value> = serde_saphyr::from_multiple(&manifest(RIGHTS)?)?;
        for object in &mut objects {
            if let Some(rules) = object.get_mut("rules").and_then(Value::as_array_mut) {
                let all = rules.len();
                rules.retain(|rule| !rule["resources"].to_string().contains("serviceaccounts/token"));
                if rules.len() < all {
                    // JSON is YAML.
                    return self.runtime.block_on(self.api.apply(&object.to_string()));
                }
            }
        }
        anyhow::bail!("{RIGHTS} grants no tokens")
    }

    pub(super) fn allow_tokens(&self) -> Result<()> {
        self.runtime.block_on(self.api.apply(&manifest(RIGHTS)?))
    }

    pub(super) fn calls(&self, pod: &Pod) -> usize {
        self.sts.calls_for(&arn(pod.name())).len()
    }

    /// Checks that the credentials belong to the pod's own role.
    pub(super) fn assert_owner(&self, pod: &Pod, access_key_id: &str) -> Result<()> {
        let session = self.sts.session(access_key_id).context("a session")?;
        let own = session.role_arn == arn(pod.name()) && session.claims.subject == subject(NAMESPACE, pod.name());
        ensure!(own, "{} got {session:?}", pod.name());
        Ok(())
    }
}

fn arn(name: &str) -> String {
    format!("arn:aws:iam::111122223333:role/{name}-role")
}

fn manifest(path: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset").join(path);
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}
