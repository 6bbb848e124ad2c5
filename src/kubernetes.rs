//! The way to the API server: one configuration, the identity that each use of it takes, and how long its silence
//! is borne. Knows no stage.

pub mod review;
pub mod slim;
pub mod taint;
pub mod watch;

use std::{
    future::Future,
    path::Path,
    pin::Pin,
    task::{Context as TaskContext, Poll},
    time::Duration,
};

use anyhow::{Context, bail};
use clap::ValueEnum;
use http::{HeaderName, HeaderValue, Request, Response};
use http_body_util::BodyExt;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use kube::{
    Api, Client, Config,
    api::PostParams,
    client::{Body, ClientBuilder},
    config::KubeConfigOptions,
};
use tower::{Layer, Service, util::MapRequestLayer};
use tracing::{info, warn};

use crate::{clock::Backoff, observe::Heard};
use slim::{Keep, SlimLayer};

/// A watch is silent for a minute between bookmarks; a longer silence is a dead connection.
const WATCH_READ_TIMEOUT: Duration = Duration::from_secs(90);
const CALL_READ_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How tokens of pods' service accounts are minted, and this node's pods are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mint {
    /// Whichever of the two the agent may; impersonating where it may both.
    Auto,
    /// Impersonating this node (constrained impersonation, KEP-5284; Kubernetes >= 1.36): the API server itself refuses
    /// tokens for pods of other nodes.
    #[value(name = "impersonation")]
    Impersonate,
    /// As the agent itself, fenced by a ValidatingAdmissionPolicy.
    Direct,
}

/// Makes clients of one API server.
#[derive(Debug, Clone)]
pub struct Kubernetes {
    config: Config,
    node: String,
}

/// In whose name a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    Agent,
    Node,
}

impl Kubernetes {
    /// # Errors
    /// There are no credentials for an API server.
    pub async fn new(kubeconfig: Option<&Path>, node: String) -> anyhow::Result<Self> {
        let mut config = match kubeconfig {
            Some(path) => {
                let read = kube::config::Kubeconfig::read_from(path);
                let read = read.with_context(|| format!("--kubeconfig {}", path.display()))?;
                Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?
            }
            None => Config::incluster()
                .context("no pod's credentials for an API server here: give --kubeconfig, or --workloads to run without Kubernetes")?,
        };
        // Up to 15 tries and whatever Retry-After says: every call here has a deadline, and its own idea of retrying.
        config.default_retry = false;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        Ok(Self { config, node })
    }

    /// For single calls.
    ///
    /// # Errors
    /// The TLS configuration is not usable.
    pub fn calls(&self, identity: Identity) -> anyhow::Result<Client> {
        Ok(ClientBuilder::try_from(self.config(identity, CALL_READ_TIMEOUT)?)?.build())
    }

    /// For single reads of pods and service accounts, of whose annotations only `keep` are received.
    ///
    /// # Errors
    /// The TLS configuration is not usable.
    pub fn reads(&self, identity: Identity, keep: Keep) -> anyhow::Result<Client> {
        let config = self.config(identity, CALL_READ_TIMEOUT)?;
        Ok(ClientBuilder::try_from(config)?.with_layer(&SlimLayer(keep)).build())
    }

    /// For a watch, whose every byte is noted in `heard`. Of annotations only `keep` are received.
    ///
    /// # Errors
    /// The TLS configuration is not usable.
    pub fn watch(&self, identity: Identity, heard: Heard, keep: Keep) -> anyhow::Result<Client> {
        let config = self.config(identity, WATCH_READ_TIMEOUT)?;
        let up_to_date = MapRequestLayer::new(watch::up_to_date);
        Ok(ClientBuilder::try_from(config)?
            .with_layer(&up_to_date)
            .with_layer(&Listening(heard))
            .with_layer(&SlimLayer(keep))
            .build())
    }

    fn config(&self, identity: Identity, read_timeout: Duration) -> anyhow::Result<Config> {
        let mut config = self.config.clone();
        config.read_timeout = Some(read_timeout);
        if identity == Identity::Node {
            let user = HeaderValue::from_str(&format!("system:node:{}", self.node))
                .with_context(|| format!("--node-name {}: is no name of a node", self.node))?;
            config.headers.push((HeaderName::from_static("impersonate-user"), user));
        }
        Ok(config)
    }

    /// Which way of minting the agent was granted. Asks until the API server answers.
    ///
    /// # Errors
    /// It was granted neither, or not the one that was asked for.
    pub async fn choose(&self, wanted: Mint) -> anyhow::Result<Identity> {
        let client = self.calls(Identity::Agent)?;
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
        let granted = loop {
            match Granted::ask(&client).await {
                Ok(granted) => break granted,
                Err(error) => {
                    warn!(
                        error = format!("{error:#}"),
                        "the API server does not say what this agent may do; asking again"
                    );
                    tokio::time::sleep(backoff.pause()).await;
                }
            }
        };
        let identity = granted.identity(wanted)?;
        self.announce(identity);
        Ok(identity)
    }

    /// The same, asked once.
    ///
    /// # Errors
    /// The API server does not say, or neither way was granted.
    pub async fn granted(&self, wanted: Mint) -> anyhow::Result<Identity> {
        Granted::ask(&self.calls(Identity::Agent)?).await?.identity(wanted)
    }

    pub fn announce(&self, identity: Identity) {
        match identity {
            Identity::Node => {
                info!(way = "impersonate", node = %self.node, "tokens are minted impersonating this node");
            }
            Identity::Agent => info!(
                way = "direct",
                "tokens are minted directly: the API server does not check that a pod is on this node"
            ),
        }
    }
}

/// Which ways of minting the agent may go.
#[derive(Debug, Clone, Copy)]
pub struct Granted {
    impersonate: bool,
    direct: bool,
}

impl Granted {
    /// # Errors
    /// The API server does not answer.
    pub async fn ask(client: &Client) -> anyhow::Result<Self> {
        Ok(Self { impersonate: may(client, IMPERSONATE).await?, direct: may(client, DIRECT).await? })
    }

    /// In whose name tokens are minted.
    ///
    /// # Errors
    /// The agent was granted neither way, or not the one that was asked for.
    pub fn identity(self, wanted: Mint) -> anyhow::Result<Identity> {
        match (wanted, self.impersonate, self.direct) {
            (Mint::Auto | Mint::Impersonate, true, _) => Ok(Identity::Node),
            (Mint::Auto | Mint::Direct, _, true) => Ok(Identity::Agent),
            (Mint::Impersonate, false, _) => bail!(
                "--minting impersonation: the agent may not {}; apply daemonset/components/constrained-impersonation \
                 (Kubernetes >= 1.36)",
                IMPERSONATE.0
            ),
            (Mint::Direct, ..) => {
                bail!(
                    "--minting direct: the agent may not create serviceaccounts/token; apply daemonset/components/direct-minting"
                )
            }
            (Mint::Auto, ..) => bail!(
                "--minting auto: the agent may neither {} nor create serviceaccounts/token; apply one of \
                 daemonset/components/constrained-impersonation and direct-minting",
                IMPERSONATE.0
            ),
        }
    }
}

/// Verb, API group, resource, subresource.
pub type Access = (&'static str, &'static str, &'static str, Option<&'static str>);
const IMPERSONATE: Access = ("impersonate-on:associated-node:create", "", "serviceaccounts", Some("token"));
const DIRECT: Access = ("create", "", "serviceaccounts", Some("token"));

/// Whether the API server would let this client do so, in every namespace.
///
/// # Errors
/// It does not answer.
pub async fn may(client: &Client, (verb, group, resource, subresource): Access) -> anyhow::Result<bool> {
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                verb: Some(verb.into()),
                group: Some(group.into()),
                resource: Some(resource.into()),
                subresource: subresource.map(Into::into),
                ..ResourceAttributes::default()
            }),
            ..SelfSubjectAccessReviewSpec::default()
        },
        ..SelfSubjectAccessReview::default()
    };
    let reviews: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let answered = reviews.create(&PostParams::default(), &review).await?;
    Ok(answered.status.is_some_and(|status| status.allowed))
}

/// Notes when anything arrives. kube's watcher keeps bookmarks to itself, and they are what tells a quiet watch from a
/// dead one.
#[derive(Debug, Clone)]
struct Listening<S>(S);

impl<S> Layer<S> for Listening<Heard> {
    type Service = ListeningService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ListeningService { inner, heard: self.0.clone() }
    }
}

#[derive(Debug, Clone)]
struct ListeningService<S> {
    inner: S,
    heard: Heard,
}

impl<S, B> Service<Request<Body>> for ListeningService<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    B: http_body::Body<Data = bytes::Bytes> + Send + Unpin + 'static,
    B::Error: 'static,
{
    type Response = Response<http_body_util::combinators::MapFrame<B, Note>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let heard = self.heard.clone();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let note: Note = Box::new(move |frame| {
                heard.now();
                frame
            });
            Ok(answer.await?.map(|body| body.map_frame(note)))
        })
    }
}

type Note = Box<dyn FnMut(http_body::Frame<bytes::Bytes>) -> http_body::Frame<bytes::Bytes> + Send>;
