//! Tests of attribution, authorization and exchange with the real binary and a real kube-apiserver. Each test has its
//! own node, STS stand-in and Kubernetes namespace, and an agent with exactly the rights of the manifests.

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
mod stolen_agent_token;
mod streaming;
mod raw_client;
mod waiting;

use std::time::Duration;

lab::enter!();

/// Maximum duration of any operation of the agent or the API server on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Maximum delay of a watch event. Shorter than the lifetime of a cached live lookup (10 s), so that a test that waits
/// this long proves the watch.
const WATCH_TIMEOUT: Duration = Duration::from_secs(5);
