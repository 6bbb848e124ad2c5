//! Attribution, authorization and exchange, through the real binary and a real kube-apiserver: each test with a node,
//! an STS and a Kubernetes namespace of its own, and an agent that has the rights of the manifests and nothing more.

mod annotations;
mod bridge;
mod container;
mod container_redirect;
mod container_sdk;
mod exchange;
mod lifecycle;
mod memory;
mod minio;
mod minting;
mod outage;
mod records;
mod rights;
mod site;
mod stolen;
mod streaming;
mod thief;
mod waiting;

use std::time::Duration;

lab::enter!();

/// Enough for anything that the agent or the API server does on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// What a watch tells is known much sooner than what was remembered of a live read would be forgotten (10 s).
const SOON: Duration = Duration::from_secs(5);
