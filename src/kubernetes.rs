//! Clients of the API server: one configuration, with the identity and timeouts for each use. Depends on no stage.

pub mod json_filter;
pub mod review;
pub mod taint;
pub mod watch;

use std::{
    path::Path,
    task::{Context as TaskContext, Poll},
    time::Duration,
};

use anyhow::{Context, bail};
use clap::ValueEnum;
use futures::future::BoxFuture;
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

use crate::{clock::Backoff, observe::LastActivity};
use json_filter::{AnnotationFilter, FilterLayer};

/// Bookmarks arrive every minute; a longer silence means a dead connection.
const WATCH_READ_TIMEOUT: Duration = Duration::from_secs(90);
const CALL_READ_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How tokens of pods' service accounts are minted and this node's pods are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MintMode {
    /// The mode that the agent has permission for; impersonation if it has both.
    Auto,
    /// Impersonates this node (constrained impersonation, Kubernetes >= 1.36), so that the API server rejects tokens for
    /// pods of other nodes: <https://github.com/kubernetes/enhancements/issues/5284>.
    Impersonation,
    /// Mints as the agent itself, limited by a ValidatingAdmissionPolicy.
    Direct,
}

/// Creates clients of one API server.
#[derive(Debug, Clone)]
pub struct ClientFactory {
    config: Config,
    node: String,
}

/// Identity of a client at the API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// The agent's own service account.
    Agent,
    /// This node, impersonated.
    Node,
}

impl ClientFactory {
    /// Reads the kubeconfig, or the in-cluster configuration.
    ///
    /// # Errors
    /// The kubeconfig cannot be read, or there are no in-cluster credentials.
    pub async fn new(kubeconfig: Option<&Path>, node: String) -> anyhow::Result<Self> {
        let mut config = match kubeconfig {
            Some(path) => {
                let read = kube::config::Kubeconfig::read_from(path);
                let read = read.with_context(|| format!("--kubeconfig {}", path.display()))?;
                Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?
            }
            None => Config::incluster()
                .context("no in-cluster credentials for the API server: set --kubeconfig, or --workloads to run without Kubernetes")?,
        };
        // kube would retry up to 15 times and honor Retry-After. Each call here has a deadline and its own retry policy.
        config.default_retry = false;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        Ok(Self { config, node })
    }

    /// Returns a client for single calls.
    ///
    /// # Errors
    /// The TLS configuration is unusable.
    pub fn call_client(&self, identity: Identity) -> anyhow::Result<Client> {
        Ok(ClientBuilder::try_from(self.config(identity, CALL_READ_TIMEOUT)?)?.build())
    }

    /// Returns a client for single reads of pods and service accounts. Drops all annotations but those of `keep`.
    ///
    /// # Errors
    /// The TLS configuration is unusable.
    pub fn read_client(&self, identity: Identity, keep: AnnotationFilter) -> anyhow::Result<Client> {
        let config = self.config(identity, CALL_READ_TIMEOUT)?;
        Ok(ClientBuilder::try_from(config)?.with_layer(&FilterLayer(keep)).build())
    }

    /// Returns a client for a watch. Records each received frame in `activity`. Drops all annotations but those of `keep`.
    ///
    /// # Errors
    /// The TLS configuration is unusable.
    pub fn watch_client(
        &self,
        identity: Identity,
        activity: LastActivity,
        keep: AnnotationFilter,
    ) -> anyhow::Result<Client> {
        let config = self.config(identity, WATCH_READ_TIMEOUT)?;
        let consistent_list = MapRequestLayer::new(watch::require_consistent_list);
        Ok(ClientBuilder::try_from(config)?
            .with_layer(&consistent_list)
            .with_layer(&ActivityLayer(activity))
            .with_layer(&FilterLayer(keep))
            .build())
    }

    fn config(&self, identity: Identity, read_timeout: Duration) -> anyhow::Result<Config> {
        let mut config = self.config.clone();
        config.read_timeout = Some(read_timeout);
        if identity == Identity::Node {
            let user = HeaderValue::from_str(&format!("system:node:{}", self.node))
                .with_context(|| format!("--node-name {}: is not a valid node name", self.node))?;
            config.headers.push((HeaderName::from_static("impersonate-user"), user));
        }
        Ok(config)
    }

    /// Returns the identity that mints tokens, by the agent's permissions. Retries until the API server answers.
    ///
    /// # Errors
    /// The agent has no permission to mint tokens, or not in the configured mode.
    pub async fn resolve_identity(&self, wanted: MintMode) -> anyhow::Result<Identity> {
        let client = self.call_client(Identity::Agent)?;
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
        let permissions = loop {
            match MintPermissions::query(&client).await {
                Ok(permissions) => break permissions,
                Err(error) => {
                    warn!(error = format!("{error:#}"), "querying the agent's permissions failed; retrying");
                    tokio::time::sleep(backoff.pause()).await;
                }
            }
        };
        let identity = permissions.identity(wanted)?;
        self.log_identity(identity);
        Ok(identity)
    }

    /// Returns the same with a single query.
    ///
    /// # Errors
    /// The API server does not answer, or the agent has no permission to mint tokens in the configured mode.
    pub async fn query_identity(&self, wanted: MintMode) -> anyhow::Result<Identity> {
        MintPermissions::query(&self.call_client(Identity::Agent)?).await?.identity(wanted)
    }

    pub fn log_identity(&self, identity: Identity) {
        match identity {
            Identity::Node => {
                info!(mode = "impersonation", node = %self.node, "tokens are minted by impersonating this node");
            }
            Identity::Agent => info!(
                mode = "direct",
                "tokens are minted as the agent: the API server does not check that a pod is on this node"
            ),
        }
    }
}

/// The agent's permissions to mint tokens.
#[derive(Debug, Clone, Copy)]
pub struct MintPermissions {
    impersonate: bool,
    direct: bool,
}

impl MintPermissions {
    /// Queries the permissions by SelfSubjectAccessReview.
    ///
    /// # Errors
    /// The API server does not answer.
    pub async fn query(client: &Client) -> anyhow::Result<Self> {
        Ok(Self { impersonate: is_allowed(client, IMPERSONATE).await?, direct: is_allowed(client, DIRECT).await? })
    }

    /// Returns the identity that mints tokens.
    ///
    /// # Errors
    /// The agent has no permission to mint tokens, or not in the configured mode.
    pub fn identity(self, wanted: MintMode) -> anyhow::Result<Identity> {
        match (wanted, self.impersonate, self.direct) {
            (MintMode::Auto | MintMode::Impersonation, true, _) => Ok(Identity::Node),
            (MintMode::Auto | MintMode::Direct, _, true) => Ok(Identity::Agent),
            (MintMode::Impersonation, false, _) => bail!(
                "--minting impersonation: the agent may not {}; apply daemonset/components/constrained-impersonation \
                 (Kubernetes >= 1.36)",
                IMPERSONATE.0
            ),
            (MintMode::Direct, ..) => {
                bail!(
                    "--minting direct: the agent may not create serviceaccounts/token; apply daemonset/components/direct-minting"
                )
            }
            (MintMode::Auto, ..) => bail!(
                "--minting auto: the agent may neither {} nor create serviceaccounts/token; apply one of \
                 daemonset/components/constrained-impersonation and direct-minting",
                IMPERSONATE.0
            ),
        }
    }
}

/// A permission: verb, API group, resource, subresource.
pub type Access = (&'static str, &'static str, &'static str, Option<&'static str>);
const IMPERSONATE: Access = ("impersonate-on:associated-node:create", "", "serviceaccounts", Some("token"));
const DIRECT: Access = ("create", "", "serviceaccounts", Some("token"));

/// Returns whether the client has the permission in all namespaces.
///
/// # Errors
/// The API server does not answer.
pub async fn is_allowed(client: &Client, (verb, group, resource, subresource): Access) -> anyhow::Result<bool> {
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
    let response = reviews.create(&PostParams::default(), &review).await?;
    Ok(response.status.is_some_and(|status| status.allowed))
}

/// Records when a frame arrives. kube's watcher does not pass on bookmarks, which distinguish a quiet watch from a dead
/// one.
#[derive(Debug, Clone)]
struct ActivityLayer(LastActivity);

impl<S> Layer<S> for ActivityLayer {
    type Service = ActivityService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ActivityService { inner, activity: self.0.clone() }
    }
}

#[derive(Debug, Clone)]
struct ActivityService<S> {
    inner: S,
    activity: LastActivity,
}

impl<S, B> Service<Request<Body>> for ActivityService<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    B: http_body::Body<Data = bytes::Bytes> + Send + Unpin + 'static,
    B::Error: 'static,
{
    type Response = Response<http_body_util::combinators::MapFrame<B, RecordFrame>>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let activity = self.activity.clone();
        let response = self.inner.call(request);
        Box::pin(async move {
            let record: RecordFrame = Box::new(move |frame| {
                activity.touch();
                frame
            });
            Ok(response.await?.map(|body| body.map_frame(record)))
        })
    }
}

type RecordFrame = Box<dyn FnMut(http_body::Frame<bytes::Bytes>) -> http_body::Frame<bytes::Bytes> + Send>;
