//! Test fixture: a node of the cluster with an agent's rights, an STS stand-in that trusts the cluster's issuer, and
//! the actions of kubelet, container runtime and administrators.

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

use crate::rights::{AgentRights, api_server};
use crate::{TIMEOUT, WATCH_TIMEOUT};

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
        Self::with_rights(AgentRights::Impersonation)
    }

    /// Creates a site whose agent has these rights and detects its minting mode.
    pub(crate) fn with_rights(rights: AgentRights) -> Result<Self> {
        let api = api_server()?;
        let node = Node::new()?;
        let kubeconfig = blocking(api.agent_kubeconfig(rights.namespace(), "kirsa", node.name()))?;
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

    /// Returns the Kubernetes namespace of this node's pods.
    pub(crate) fn namespace(&self) -> &str {
        self.node.name()
    }

    /// Creates a service account with its own role, which trusts it.
    pub(crate) fn account(&self, name: &str) -> Result<()> {
        self.trust(&arn(name), name);
        self.annotate(name, &[(ROLE_ARN, &arn(name))])
    }

    /// Creates or changes a service account to have exactly these annotations.
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

    /// Binds a new pod to this node like the scheduler, without an address; returns its UID.
    pub(crate) fn bind(&self, name: &str, account: &str) -> Result<String> {
        blocking(self.api.pod(self.namespace(), name, account, self.node.name()))
    }

    /// Attaches the pod to its network like the container runtime.
    pub(crate) fn attach(&self, name: &str) -> Result<Pod> {
        self.node.pod(name, Shape::RoutedBare)
    }

    /// Attaches the pod to its network with an address that another pod had.
    pub(crate) fn attach_at(&self, name: &str, address: Address) -> Result<Pod> {
        self.node.pod_at(name, Shape::RoutedBare, address)
    }

    /// Reports the pod's address to the API server like the kubelet.
    pub(crate) fn report_address(&self, pod: &Pod) -> Result<()> {
        self.report(pod.name(), "Running", &pod.address().ips())
    }

    pub(crate) fn report(&self, name: &str, phase: &str, ips: &[IpAddr]) -> Result<()> {
        blocking(self.api.set_pod_status(self.namespace(), name, phase, ips))
    }

    pub(crate) fn delete(&self, name: &str) -> Result<()> {
        blocking(self.api.delete_pod(self.namespace(), name))
    }

    /// Starts a pod and reports its address to the API server.
    pub(crate) fn run(&self, name: &str, account: &str) -> Result<Pod> {
        self.bind(name, account)?;
        let pod = self.attach(name)?;
        self.report_address(&pod)?;
        Ok(pod)
    }

    /// Starts a pod with a CNI record, and reports its address to the API server.
    pub(crate) fn run_recorded(&self, name: &str, account: &str) -> Result<(Pod, Sandbox)> {
        let sandbox = self.sandbox(name, &self.bind(name, account)?);
        let pod = self.attach(name)?;
        self.records()?.add(&sandbox, &pod)?;
        self.report_address(&pod)?;
        Ok((pod, sandbox))
    }

    pub(crate) fn records(&self) -> Result<Results> {
        self.node.cni_results()
    }

    pub(crate) fn sandbox(&self, pod: &str, uid: &str) -> Sandbox {
        Sandbox::new(self.namespace(), pod, uid)
    }

    /// Asserts that a pod gets credentials of the account's role, for a token of the account; returns the access key
    /// ID. Retries after a 503 like SDKs, since the API server may be slow for a moment.
    pub(crate) fn assert_served(&self, pod: &Pod, account: &str) -> Result<String> {
        let list = retry_while_503(|| pod.imds().role_list())?;
        ensure!(list.status == 200 && list.body == role(account), "{}: {list:?}", pod.name());
        let session = self.session(&retry_while_503(|| credentials(pod, &role(account)))?)?;
        self.assert_session_of(&session, account)?;
        let call = self.calls(account).into_iter().find(|call| issued_key(call) == Some(&session.access_key_id));
        let call = call.with_context(|| format!("no STS call issued {}", session.access_key_id))?;
        ensure!(call.session_name == format!("{}.{account}", self.namespace()), "{call:?}");
        Ok(session.access_key_id)
    }

    /// Asserts that a session is of the account's role, for a token of the account.
    pub(crate) fn assert_session_of(&self, session: &Session, account: &str) -> Result<()> {
        let subject = &session.claims.subject;
        ensure!(session.role_arn == arn(account) && *subject == self.subject(account), "{session:?} of {subject}");
        ensure!(session.claims.audience == [AUDIENCE], "{:?}", session.claims);
        Ok(())
    }

    /// Returns the STS session of a credentials document.
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

/// Requests the role's credentials without an IMDS token, and without requesting the role list first.
pub(crate) fn credentials(pod: &Pod, role: &str) -> Result<Response> {
    pod.imds().get(&format!("{CREDENTIALS_PATH}{role}")).send()
}

pub(crate) fn list(pod: &Pod) -> Result<Response> {
    pod.imds().get(CREDENTIALS_PATH).send()
}

pub(crate) fn wait_for_metric(agent: &Agent, name: &str, labels: &[(&str, &str)], value: f64) -> Result<()> {
    let mut last = None;
    poll(&format!("{name} {labels:?} {value}"), TIMEOUT, || {
        last = agent.metric(name, labels).ok();
        (last == Some(value)).then_some(())
    })
    .with_context(|| format!("it is {last:?}"))
}

/// Requests until the response is not 503; returns the last response.
pub(crate) fn retry_while_503(request: impl Fn() -> Result<Response>) -> Result<Response> {
    let mut last = request();
    let _ = poll("a response other than 503", WATCH_TIMEOUT, || {
        let again = last.as_ref().is_ok_and(|answer| answer.status == 503);
        again.then(|| last = request());
        (!again).then_some(())
    });
    last
}

fn issued_key(call: &Call) -> Option<&String> {
    match call.outcome.as_ref()? {
        Outcome::Issued { access_key_id } => Some(access_key_id),
        _ => None,
    }
}

pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Runs an API call to completion. Each test is its own thread, so it can block.
pub(crate) fn blocking<T>(call: impl Future<Output = T>) -> T {
    runtime().block_on(call)
}
