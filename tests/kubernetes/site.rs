//! A node of the cluster with an agent's rights, an STS that trusts the cluster's issuer, and what kubelet, container
//! runtime and administrators would do.

use std::future::Future;
use std::net::{IpAddr, TcpListener};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Api;
use kube::api::DeleteParams;
use lab::agent::{Agent, Options};
use lab::apiserver::{ApiServer, ISSUER};
use lab::cni::{Results, Sandbox};
use lab::http::{CREDENTIALS_PATH, Response};
use lab::namespace::BASE;
use lab::net::{Address, Node, Pod, Shape};
use lab::poll::poll;
use lab::sts::{Call, Config, Jwks, Keys, Outcome, Provider, Role, Session, StandIn};
use tokio::runtime::Runtime;

use crate::rights::{Way, granted};
use crate::{PATIENCE, SOON};

pub(crate) const ROLE_ARN: &str = "eks.amazonaws.com/role-arn";
pub(crate) const AUDIENCE: &str = "sts.amazonaws.com";

pub(crate) struct Site {
    pub(crate) api: &'static ApiServer,
    pub(crate) node: Node,
    pub(crate) sts: StandIn,
    pub(crate) options: Options,
}

impl Site {
    pub(crate) fn new() -> Result<Self> {
        Self::with(Way::Impersonate)
    }

    /// With an agent that has the rights of that way, and finds out about them by itself.
    pub(crate) fn with(way: Way) -> Result<Self> {
        let api = granted()?;
        let node = Node::new()?;
        let kubeconfig = blocking(api.agent_kubeconfig(way.namespace(), "kirsa", node.name()))?;
        blocking(api.namespace(node.name()))?;
        let jwks = Jwks {
            url: format!("{}/openid/v1/jwks", api.url()),
            authority: std::fs::read_to_string(api.ca())?,
            ..Jwks::default()
        };
        let providers = vec![Provider::new(ISSUER, Keys::Published(jwks))];
        let sts = StandIn::start(TcpListener::bind((BASE, 0))?, Config { providers, ..Config::default() })?;
        let options = Options::new(env!("CARGO_BIN_EXE_kirsa"))
            .flag("--kubeconfig", &kubeconfig)
            .flag("--sts-endpoint-url", sts.url());
        Ok(Self { api, node, sts, options })
    }

    pub(crate) fn start(&self) -> Result<Agent> {
        Agent::start(&self.node, &self.options)
    }

    /// The Kubernetes namespace of this node's pods.
    pub(crate) fn namespace(&self) -> &str {
        self.node.name()
    }

    /// A service account with a role of its own, which STS lets it assume.
    pub(crate) fn account(&self, name: &str) -> Result<()> {
        self.trust(&arn(name), name);
        self.annotate(name, &[(ROLE_ARN, &arn(name))])
    }

    /// A service account with exactly these annotations: made, or changed.
    pub(crate) fn annotate(&self, name: &str, annotations: &[(&str, &str)]) -> Result<()> {
        blocking(self.api.service_account(self.namespace(), name, annotations))
    }

    pub(crate) fn delete_account(&self, name: &str) -> Result<()> {
        blocking(async {
            let accounts: Api<ServiceAccount> = Api::namespaced(self.api.client().await?, self.namespace());
            accounts.delete(name, &DeleteParams::default()).await?;
            Ok(())
        })
    }

    pub(crate) fn trust(&self, arn: &str, account: &str) {
        self.sts.set_role(Role::trusting(arn, ISSUER, &self.subject(account)));
    }

    pub(crate) fn subject(&self, account: &str) -> String {
        lab::issuer::subject(self.namespace(), account)
    }

    /// The scheduler binds a pod to this node: it has no address yet. Its UID.
    pub(crate) fn bind(&self, name: &str, account: &str) -> Result<String> {
        blocking(self.api.pod(self.namespace(), name, account, self.node.name()))
    }

    /// The runtime gives the pod its network.
    pub(crate) fn join(&self, name: &str) -> Result<Pod> {
        self.node.pod(name, Shape::RoutedBare)
    }

    /// The same with an address that was another pod's.
    pub(crate) fn join_at(&self, name: &str, address: Address) -> Result<Pod> {
        self.node.pod_at(name, Shape::RoutedBare, address)
    }

    /// The kubelet reports the pod's address.
    pub(crate) fn show(&self, pod: &Pod) -> Result<()> {
        self.report(pod.name(), "Running", &pod.address().ips())
    }

    pub(crate) fn report(&self, name: &str, phase: &str, ips: &[IpAddr]) -> Result<()> {
        blocking(self.api.set_pod_status(self.namespace(), name, phase, ips))
    }

    pub(crate) fn delete(&self, name: &str) -> Result<()> {
        blocking(self.api.delete_pod(self.namespace(), name))
    }

    /// A pod that runs, and that the API server shows with its address.
    pub(crate) fn run(&self, name: &str, account: &str) -> Result<Pod> {
        self.bind(name, account)?;
        let pod = self.join(name)?;
        self.show(&pod)?;
        Ok(pod)
    }

    /// The same with a CNI record, as on a node whose runtime writes them.
    pub(crate) fn run_recorded(&self, name: &str, account: &str) -> Result<(Pod, Sandbox)> {
        let sandbox = self.sandbox(name, &self.bind(name, account)?);
        let pod = self.join(name)?;
        self.records()?.add(&sandbox, &pod)?;
        self.show(&pod)?;
        Ok((pod, sandbox))
    }

    pub(crate) fn records(&self) -> Result<Results> {
        self.node.cni_results()
    }

    pub(crate) fn sandbox(&self, pod: &str, uid: &str) -> Sandbox {
        Sandbox::new(self.namespace(), pod, uid)
    }

    /// That a pod gets credentials of that account's role, for a token of that account; the access key id. It asks
    /// again after a 503, as SDKs do, which an API server that is slow for a moment may cost it.
    pub(crate) fn serves(&self, pod: &Pod, account: &str) -> Result<String> {
        let list = decided(|| pod.imds().role_list())?;
        ensure!(list.status == 200 && list.body == role(account), "{}: {list:?}", pod.name());
        let session = self.session(&decided(|| credentials(pod, &role(account)))?)?;
        self.belongs(&session, account)?;
        let call = self.calls(account).into_iter().find(|call| issued(call) == Some(&session.access_key_id));
        let call = call.with_context(|| format!("no call of STS issued {}", session.access_key_id))?;
        ensure!(call.session_name == format!("{}.{account}", self.namespace()), "{call:?}");
        Ok(session.access_key_id)
    }

    pub(crate) fn belongs(&self, session: &Session, account: &str) -> Result<()> {
        let subject = &session.claims.subject;
        ensure!(session.role_arn == arn(account) && *subject == self.subject(account), "{session:?} of {subject}");
        ensure!(session.claims.audience == [AUDIENCE], "{:?}", session.claims);
        Ok(())
    }

    /// Whose session a document of credentials opens.
    pub(crate) fn session(&self, document: &Response) -> Result<Session> {
        ensure!(document.status == 200, "{document:?}");
        let document = document.json()?;
        let key = document["AccessKeyId"].as_str().context("a key id")?;
        self.sts.session(key).with_context(|| format!("STS issued no {key}"))
    }

    pub(crate) fn calls(&self, account: &str) -> Vec<Call> {
        self.sts.calls_for(&arn(account))
    }
}

pub(crate) fn role(account: &str) -> String {
    format!("{account}-role")
}

pub(crate) fn arn(account: &str) -> String {
    format!("arn:aws:iam::111122223333:role/{}", role(account))
}

/// Without a session token, and without asking for the role list before.
pub(crate) fn credentials(pod: &Pod, role: &str) -> Result<Response> {
    pod.imds().get(&format!("{CREDENTIALS_PATH}{role}")).send()
}

pub(crate) fn list(pod: &Pod) -> Result<Response> {
    pod.imds().get(CREDENTIALS_PATH).send()
}

pub(crate) fn wait_for_metric(agent: &Agent, name: &str, labels: &[(&str, &str)], value: f64) -> Result<()> {
    let mut last = None;
    poll(&format!("{name} {labels:?} {value}"), PATIENCE, || {
        last = agent.metric(name, labels).ok();
        (last == Some(value)).then_some(())
    })
    .with_context(|| format!("it is {last:?}"))
}

/// The first answer that is no "try again", or else the last.
pub(crate) fn decided(ask: impl Fn() -> Result<Response>) -> Result<Response> {
    let mut last = ask();
    let _ = poll("another answer than 503", SOON, || {
        let again = last.as_ref().is_ok_and(|answer| answer.status == 503);
        again.then(|| last = ask());
        (!again).then_some(())
    });
    last
}

fn issued(call: &Call) -> Option<&String> {
    match call.outcome.as_ref()? {
        Outcome::Issued { access_key_id } => Some(access_key_id),
        _ => None,
    }
}

pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Calls of the API server from a test, which is a thread of its own and waits for each.
pub(crate) fn blocking<T>(call: impl Future<Output = T>) -> T {
    runtime().block_on(call)
}
