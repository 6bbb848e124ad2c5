//! The node, its pods as the API server and the node's CNI records show them, and who they are.

use std::collections::HashMap;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::stream::{self, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod as KubePod;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};

use super::seat::{Guest, Order};
use super::{ERRORS, Effect, Fault, PATIENCE, Plan, STS, poll};
use crate::agent::{Agent, Options};
use crate::apiserver::{ApiServer, ISSUER};
use crate::cni::{Results, Sandbox};
use crate::imds::{Canary, Instance};
use crate::issuer::subject;
use crate::namespace::BASE;
use crate::net::{Address, Node, Pod, Shape};
use crate::netns::Netns;
use crate::sts::{Config, Keys, Outcome, Provider, Role, StandIn};

const NAMESPACE: &str = "soak";
const ROLE_ARN: &str = "eks.amazonaws.com/role-arn";
/// Pods share network namespaces, ten to one, each with an address of its own: what the agent sees of them is the same,
/// and several come and go in a second.
const PER_NAMESPACE: usize = 10;
/// After its record was written, until the API server shows a pod's address, as measured of a busy kubelet.
const REPORTED: (Duration, Duration) = (Duration::from_millis(420), Duration::from_millis(2_500));
const RIGHTS: [&str; 2] = ["base/rbac.yaml", "components/constrained-impersonation/rbac.yaml"];

pub(super) struct Fleet {
    node: Node,
    hosts: Vec<Pod>,
    namespaces: Vec<Arc<Netns>>,
    addresses: Vec<Address>,
    canaries: Vec<Canary>,
    sts: Arc<StandIn>,
    records: Results,
    options: Options,
    runtime: Runtime,
    pods: Api<KubePod>,
    accounts: usize,
    /// Who is on which seat.
    present: HashMap<usize, (Guest, Sandbox)>,
    came: usize,
    random: Random,
    /// When kubelet is going to tell of which pod.
    unreported: Vec<(Instant, String, Address)>,
    /// Since when an account has pods here; and how often that was long enough for how many sessions.
    since: HashMap<usize, (usize, Instant)>,
    least: f64,
    session: Duration,
}

impl Fleet {
    pub(super) fn new(agent: PathBuf, plan: &Plan) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (api, node) = (ApiServer::get()?, Node::new()?);
        let (kubeconfig, client) = runtime.block_on(async {
            api.namespace("kirsa").await?;
            for rights in RIGHTS {
                let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../daemonset").join(rights);
                api.apply(&fs::read_to_string(&path).with_context(|| path.display().to_string())?).await?;
            }
            anyhow::Ok((api.agent_kubeconfig("kirsa", "kirsa", node.name()).await?, api.client().await?))
        })?;
        let roles = (0..plan.accounts).map(|n| Role::trusting(&arn(n), ISSUER, &subject(NAMESPACE, &account(n))));
        let keys = Keys::Given(serde_json::from_value(runtime.block_on(api.jwks())?)?);
        let config =
            Config { providers: vec![Provider::new(ISSUER, keys)], roles: roles.collect(), ..Config::default() };
        let sts = Arc::new(StandIn::start(TcpListener::bind((BASE, 0))?, config)?);
        sts.configure(|settings| settings.session_seconds = Some(plan.session));
        sts.inject(Fault::always(Effect::delay(STS)));
        sts.inject(Fault::one_in(ERRORS, Effect::Status(503)));
        let accounts = stream::iter(0..plan.accounts)
            .map(|n| async move { api.service_account(NAMESPACE, &account(n), &[(ROLE_ARN, &arn(n))]).await });
        runtime.block_on(async {
            api.namespace(NAMESPACE).await?;
            accounts.buffer_unordered(4).try_collect::<()>().await
        })?;

        let hosts = (0..plan.pods.div_ceil(PER_NAMESPACE))
            .map(|n| node.pod(&format!("host{n}"), Shape::RoutedBare))
            .collect::<Result<Vec<_>>>()?;
        let mut addresses = Vec::new();
        for seat in 0..plan.pods {
            let host = &hosts[seat / PER_NAMESPACE];
            let address = if seat.is_multiple_of(PER_NAMESPACE) { host.address() } else { node.allocate() };
            if address != host.address() {
                host.netns().ip([format!("addr add {}/32 dev eth0", address.v4)])?;
                node.netns().ip([format!("route add {} dev {}", address.v4, host.host_interface())])?;
            }
            addresses.push(address);
        }
        let listeners = [node.listen_metadata()?].into_iter().chain(node.listen_metadata6()?);
        let canaries = listeners.map(|listener| Canary::start(listener, Instance::default())).collect::<Result<_>>()?;
        let options = Options::new(agent).flag("--kubeconfig", kubeconfig).flag("--sts-endpoint-url", sts.url());
        Ok(Self {
            namespaces: hosts.iter().map(|host| host.netns().clone()).collect(),
            records: node.cni_results()?,
            pods: Api::namespaced(client, NAMESPACE),
            node,
            hosts,
            addresses,
            canaries,
            sts,
            options,
            runtime,
            accounts: plan.accounts,
            present: HashMap::new(),
            came: 0,
            random: Random::default(),
            unreported: Vec::new(),
            since: HashMap::new(),
            least: 0.0,
            session: Duration::from_secs(plan.session.into()),
        })
    }

    pub(super) fn start(&self) -> Result<Agent> {
        // The API server's authorizer learns of the rights a moment after they were written.
        poll("an agent that is ready", PATIENCE, || Agent::start(&self.node, &self.options).ok())
    }

    pub(super) fn hosts(&self) -> &[Arc<Netns>] {
        &self.namespaces
    }

    pub(super) fn place(&self, seat: usize) -> (usize, Address) {
        (seat / PER_NAMESPACE, self.addresses[seat])
    }

    pub(super) fn judge(&self) -> Judge {
        Judge { sts: self.sts.clone(), random: Random::default() }
    }

    /// The scheduler binds a pod, the runtime gives it its address, and it starts.
    pub(super) fn come(&mut self, seat: usize, orders: &mpsc::UnboundedSender<Order>) -> Result<()> {
        let guest = Guest { account: self.random.below(self.accounts), number: self.came };
        self.came += 1;
        let name = format!("pod-{}", guest.number);
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {
                "serviceAccountName": account(guest.account),
                "nodeName": self.node.name(),
                "containers": [{"name": "main", "image": "none"}],
            },
        });
        let pod = serde_json::from_value(pod)?;
        let created = self.runtime.block_on(async { self.pods.create(&PostParams::default(), &pod).await });
        let uid = created?.uid().context("the API server gives every object a UID")?;
        let (sandbox, address) = (Sandbox::new(NAMESPACE, &name, &uid), self.addresses[seat]);
        self.records.add_forged(&sandbox, address)?;
        self.since.entry(guest.account).or_insert_with(|| (0, Instant::now())).0 += 1;
        ensure!(orders.send(Order::Come(guest.clone())).is_ok(), "seat {seat} is gone");
        let lag = REPORTED.0 + (REPORTED.1 - REPORTED.0).mul_f64(self.random.unit());
        self.unreported.push((Instant::now() + lag, name, address));
        self.present.insert(seat, (guest, sandbox));
        Ok(())
    }

    /// What kubelet has to report by now: the addresses of pods, some time after these have begun.
    pub(super) fn report(&mut self) -> Result<()> {
        let due: Vec<_> = self.unreported.extract_if(.., |(due, ..)| *due <= Instant::now()).collect();
        for (_, name, Address { v4: ip, .. }) in due {
            let status = json!({"status": {"phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }]}});
            let params = PatchParams::default();
            match self.runtime.block_on(async { self.pods.patch_status(&name, &params, &Patch::Merge(status)).await }) {
                // It is gone already.
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                other => drop(other?),
            }
        }
        Ok(())
    }

    /// Somebody goes, and somebody else comes to the same address.
    pub(super) fn replace(&mut self, orders: &[mpsc::UnboundedSender<Order>]) -> Result<()> {
        let seat = self.random.below(orders.len());
        let (left, gone) = oneshot::channel();
        ensure!(orders[seat].send(Order::Leave(left)).is_ok(), "seat {seat} is gone");
        self.runtime.block_on(gone)?;
        let (guest, sandbox) = self.present.remove(&seat).context("somebody is there")?;
        self.records.remove(&sandbox)?;
        let now = DeleteParams::default().grace_period(0);
        self.runtime.block_on(async { self.pods.delete(&sandbox.pod, &now).await })?;
        self.leaves(guest.account);
        self.come(seat, &orders[seat])
    }

    fn leaves(&mut self, account: usize) {
        let Some((pods, since)) = self.since.get_mut(&account) else { return };
        *pods -= 1;
        if *pods == 0 {
            self.least += needed(since.elapsed(), self.session);
            self.since.remove(&account);
        }
    }

    /// The exchanges that cannot be done without: one when an account's first pod comes, and one for each refresh at
    /// the latest moment, while it has pods here.
    pub(super) fn least_exchanges(&self) -> f64 {
        self.least + self.since.values().map(|(_, since)| needed(since.elapsed(), self.session)).sum::<f64>()
    }

    /// Of STS, that it answered with credentials and that it did not.
    pub(super) fn exchanges(&self) -> (usize, usize) {
        let calls = self.sts.calls();
        let issued = calls.iter().filter(|call| matches!(call.outcome, Some(Outcome::Issued { .. }))).count();
        (issued, calls.len() - issued)
    }

    /// Requests that got past the agent.
    pub(super) fn canary_hits(&self) -> usize {
        let of_the_node = self.node.host_ips();
        self.canaries.iter().flat_map(Canary::hits).filter(|hit| !of_the_node.contains(&hit.from.ip())).count()
    }

    pub(super) fn namespaces(&self) -> usize {
        self.hosts.len()
    }
}

fn needed(during: Duration, session: Duration) -> f64 {
    // 48 % is when a refresh begins at the latest.
    1.0 + (during.as_secs_f64() / (session.as_secs_f64() * 0.48)).floor()
}

fn account(number: usize) -> String {
    format!("account-{number}")
}

fn arn(number: usize) -> String {
    format!("arn:aws:iam::111122223333:role/role-{number}")
}

/// Who knows whose credentials are whose.
pub(super) struct Judge {
    sts: Arc<StandIn>,
    random: Random,
}

impl Judge {
    pub(super) fn role(&self, guest: &Guest) -> String {
        format!("role-{}", guest.account)
    }

    pub(super) fn is_own(&self, guest: &Guest, document: &str) -> Result<()> {
        let document: serde_json::Value = serde_json::from_str(document)?;
        let key = document["AccessKeyId"].as_str().context("a key id")?;
        let session = self.sts.session(key).with_context(|| format!("STS issued no {key}"))?;
        let own = subject(NAMESPACE, &account(guest.account));
        ensure!(session.role_arn == arn(guest.account) && session.claims.subject == own, "{session:?}");
        ensure!(session.expiration > jiff::Timestamp::now(), "expired {}", session.expiration);
        Ok(())
    }

    pub(super) fn random(&self) -> f64 {
        self.random.unit()
    }
}

/// Enough for a choice of pods: what is measured does not depend on it.
#[derive(Default)]
struct Random(std::hash::RandomState, Mutex<u64>);

impl Random {
    fn unit(&self) -> f64 {
        use std::hash::BuildHasher;
        let mut count = self.1.lock().expect("no panic while held");
        *count += 1;
        (self.0.hash_one(*count) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn below(&self, end: usize) -> usize {
        (self.unit() * end as f64) as usize
    }
}
