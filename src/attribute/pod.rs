//! A pod, as little of it as attribution needs.

use std::{fmt, net::IpAddr, sync::Arc};

use k8s_openapi::{api::core::v1::Pod as KubePod, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use serde::{Deserialize, Serialize};

use crate::kubernetes::json_filter::AnnotationFilter;

/// What the kubelet writes to the mirror of a static pod (Kubernetes, "Well-known labels, annotations and taints").
const MIRROR: &str = "kubernetes.io/config.mirror";
/// Maximum length of a static pod's UID: a hash.
const LONGEST_MIRROR: usize = 256;

/// The annotations of pods that clients of the API server receive.
pub fn keep() -> AnnotationFilter {
    Arc::new(|name| (name == MIRROR).then_some(LONGEST_MIRROR))
}

/// What a pod is, for as long as it exists, whatever its name and address.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodUid(pub Arc<str>);

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceAccountName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl fmt::Display for ServiceAccountName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// One pod of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    pub uid: PodUid,
    pub name: Arc<str>,
    pub account: ServiceAccountName,
    pub addresses: Vec<IpAddr>,
    pub host_network: bool,
    /// Of a static pod's mirror: the UID that the kubelet and the container runtime know that pod by.
    pub mirror_of: Option<PodUid>,
    /// Succeeded or Failed: its address may have gone to another pod already.
    pub ended: bool,
    /// Seconds since the epoch, by the API server's clock.
    pub created: u64,
}

impl Pod {
    #[cfg(any(test, fuzzing))]
    pub(crate) fn sample(name: &str, uid: &str, service_account: &str, addresses: &[&str]) -> Self {
        Self {
            uid: PodUid(uid.into()),
            name: name.into(),
            account: ServiceAccountName { namespace: "default".into(), name: service_account.into() },
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            host_network: false,
            mirror_of: None,
            ended: false,
            created: 0,
        }
    }
}

/// A pod as the API server sends it, less all that is not needed: 110 pods cost a third of the memory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SlimPod {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: SlimSpec,
    #[serde(default)]
    status: SlimStatus,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SlimSpec {
    service_account_name: Option<String>,
    host_network: bool,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct SlimStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Vec<SlimIp>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct SlimIp {
    ip: String,
}

impl kube::Resource for SlimPod {
    type DynamicType = ();
    type Scope = k8s_openapi::NamespaceResourceScope;

    fn kind((): &()) -> std::borrow::Cow<'_, str> {
        KubePod::kind(&())
    }

    fn group((): &()) -> std::borrow::Cow<'_, str> {
        KubePod::group(&())
    }

    fn version((): &()) -> std::borrow::Cow<'_, str> {
        KubePod::version(&())
    }

    fn plural((): &()) -> std::borrow::Cow<'_, str> {
        KubePod::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl SlimPod {
    /// `None` for an object without UID, name or namespace, which the API server does not send.
    pub fn into_pod(self) -> Option<Pod> {
        let created = self.metadata.creation_timestamp.map_or(0, |time| time.0.as_second());
        let addresses = self.status.pod_ips.iter().map(|ip| &ip.ip).chain(self.status.pod_ip.as_ref());
        let mut addresses: Vec<IpAddr> = addresses.filter_map(|ip| ip.parse().ok()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        // Of a pod that has an account it would be a way to be taken for another one.
        let account = self.spec.service_account_name.unwrap_or_default();
        let mirror_of = self.metadata.annotations.unwrap_or_default().remove(MIRROR).filter(|_| account.is_empty());
        Some(Pod {
            uid: PodUid(self.metadata.uid?.into()),
            name: self.metadata.name?.into(),
            account: ServiceAccountName {
                namespace: self.metadata.namespace?.into(),
                // Only a mirror of a static pod has none, and it may not have any: it is no pod of `default` either.
                name: account.into(),
            },
            addresses,
            host_network: self.spec.host_network,
            mirror_of: mirror_of.map(|uid| PodUid(uid.into())),
            ended: matches!(self.status.phase.as_deref(), Some("Succeeded" | "Failed")),
            created: u64::try_from(created).unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a mirror refers to is believed of it since it can be granted nothing.
    #[test]
    fn a_pod_with_a_service_account_is_no_mirror_whatever_its_annotations_say() {
        let read = |spec: serde_json::Value| {
            let annotations = serde_json::json!({ MIRROR: "hash" });
            let metadata = serde_json::json!({"name": "a", "namespace": "n", "uid": "u", "annotations": annotations});
            let pod: SlimPod = serde_json::from_value(serde_json::json!({"metadata": metadata, "spec": spec})).unwrap();
            pod.into_pod().unwrap()
        };
        let mirror = read(serde_json::json!({}));
        assert_eq!((&*mirror.account.name, mirror.mirror_of), ("", Some(PodUid("hash".into()))));
        let liar = read(serde_json::json!({"serviceAccountName": "reader"}));
        assert_eq!((&*liar.account.name, liar.mirror_of), ("reader", None));
    }
}
