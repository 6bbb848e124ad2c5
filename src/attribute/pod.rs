//! The parts of a pod that attribution needs.

use std::{fmt, net::IpAddr, sync::Arc};

use k8s_openapi::{api::core::v1::Pod as KubePod, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use serde::{Deserialize, Serialize};

use crate::{clock::UnixTime, kubernetes::json_filter::AnnotationFilter};

/// Annotation that the kubelet sets on the mirror of a static pod:
/// <https://kubernetes.io/docs/reference/labels-annotations-taints/#kubernetes-io-config-mirror>
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";
/// Maximum length of the annotation's value: a static pod's UID, which is a hash.
const MAX_MIRROR_LEN: usize = 256;

/// Returns a filter for the pod annotations that the Kubernetes clients keep.
pub fn annotation_filter() -> AnnotationFilter {
    Arc::new(|name| (name == MIRROR_ANNOTATION).then_some(MAX_MIRROR_LEN))
}

/// A pod's UID: identifies it for its lifetime, unlike its name and address, which can be reused.
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

/// A pod of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    pub uid: PodUid,
    pub name: Arc<str>,
    pub account: ServiceAccountName,
    pub addresses: Vec<IpAddr>,
    pub host_network: bool,
    /// For the mirror of a static pod: the pod's UID at the kubelet and the container runtime.
    pub mirror_of: Option<PodUid>,
    /// The phase is Succeeded or Failed: another pod may already have the address.
    pub ended: bool,
    /// Creation time, by the API server's clock.
    pub created: UnixTime,
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
            created: UnixTime(0),
        }
    }
}

/// A pod as the API server sends it, reduced to the fields in use: 110 pods take a third of the memory.
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
    /// Returns `None` for an object without UID, name or namespace, which the API server does not send.
    pub fn into_pod(self) -> Option<Pod> {
        let created = self.metadata.creation_timestamp.map_or(0, |time| time.0.as_second());
        let addresses = self.status.pod_ips.iter().map(|ip| &ip.ip).chain(self.status.pod_ip.as_ref());
        let mut addresses: Vec<IpAddr> = addresses.filter_map(|ip| ip.parse().ok()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        // Ignored on a pod with a service account, which could use it to impersonate another pod.
        let account = self.spec.service_account_name.unwrap_or_default();
        let mirror_of =
            self.metadata.annotations.unwrap_or_default().remove(MIRROR_ANNOTATION).filter(|_| account.is_empty());
        Some(Pod {
            uid: PodUid(self.metadata.uid?.into()),
            name: self.metadata.name?.into(),
            account: ServiceAccountName {
                namespace: self.metadata.namespace?.into(),
                // Empty only for mirrors of static pods, which cannot have one; they do not use `default` either.
                name: account.into(),
            },
            addresses,
            host_network: self.spec.host_network,
            mirror_of: mirror_of.map(|uid| PodUid(uid.into())),
            ended: matches!(self.status.phase.as_deref(), Some("Succeeded" | "Failed")),
            created: UnixTime(u64::try_from(created).unwrap_or(0)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mirror's reference is trusted, since a mirror has no service account and gets no credentials.
    #[test]
    fn pod_with_service_account_is_no_mirror() {
        let read = |spec: serde_json::Value| {
            let annotations = serde_json::json!({ MIRROR_ANNOTATION: "hash" });
            let metadata = serde_json::json!({"name": "a", "namespace": "n", "uid": "u", "annotations": annotations});
            let pod: SlimPod = serde_json::from_value(serde_json::json!({"metadata": metadata, "spec": spec})).unwrap();
            pod.into_pod().unwrap()
        };
        let mirror = read(serde_json::json!({}));
        assert_eq!((&*mirror.account.name, mirror.mirror_of), ("", Some(PodUid("hash".into()))));
        let forged = read(serde_json::json!({"serviceAccountName": "reader"}));
        assert_eq!((&*forged.account.name, forged.mirror_of), ("reader", None));
    }
}
