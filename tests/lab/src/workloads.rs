//! The file that tells an agent without Kubernetes who its pods are.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::net::Pod;

/// One entry; its fields are those of the file.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    pub pod: String,
    pub namespace: String,
    pub service_account: String,
    pub addresses: Vec<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Workload {
    /// A pod without a role, in the namespace `default`.
    pub fn new(pod: &Pod, service_account: &str) -> Self {
        Self {
            pod: pod.name().into(),
            namespace: "default".into(),
            service_account: service_account.into(),
            addresses: pod.address().ips(),
            role: None,
            token_file: None,
            uid: None,
            annotations: BTreeMap::new(),
        }
    }

    pub fn role(mut self, arn: &str, token_file: &Path) -> Self {
        self.role = Some(arn.into());
        self.token_file = Some(token_file.into());
        self
    }

    pub fn uid(mut self, uid: &str) -> Self {
        self.uid = Some(uid.into());
        self
    }

    /// What an annotation of the service account would say.
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        self.annotations.insert(name.into(), value.into());
        self
    }
}

/// Write the file, or replace it at once.
pub fn write(path: &Path, workloads: &[Workload]) -> Result<()> {
    // JSON is YAML.
    let text = serde_json::to_string_pretty(&serde_json::json!({ "workloads": workloads }))?;
    let new = path.with_extension("new");
    fs::write(&new, text).and_then(|()| fs::rename(&new, path)).with_context(|| path.display().to_string())
}
