//! A pod's attachment to the node, from its CNI record.

use std::{collections::BTreeSet, io, net::IpAddr, sync::Arc};

use serde::Deserialize;

use super::pod_index::Record;
use crate::intercept::{bridge_ports, rule::PodPort};

/// The node's end of a pod's network, and the source addresses that the pod may use there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attachment {
    /// Interfaces of the node that the CNI plugin created or used: the host end of the veth pair, and its bridge.
    pub interfaces: Vec<Arc<str>>,
    /// MAC address of the pod's own interface.
    pub mac: Option<[u8; 6]>,
    pub addresses: Vec<IpAddr>,
}

impl Attachment {
    pub(super) fn from_record(record: &Record) -> Option<Self> {
        let attachment =
            Self { interfaces: record.interfaces.clone(), mac: record.mac, addresses: record.addresses.clone() };
        (!attachment.interfaces.is_empty()).then_some(attachment)
    }
}

/// Returns the attachments whose interface currently is a port of a bridge.
///
/// # Errors
/// The kernel's error if the bridge ports cannot be listed.
pub fn pod_ports(attachments: &BTreeSet<Attachment>) -> io::Result<BTreeSet<PodPort>> {
    if attachments.is_empty() {
        return Ok(BTreeSet::new());
    }
    let ports = bridge_ports()?;
    let port = |attachment: &Attachment, interface: &Arc<str>| PodPort {
        interface: interface.clone(),
        mac: attachment.mac,
        addresses: attachment.addresses.clone(),
    };
    let all = attachments.iter().flat_map(|attachment| {
        let interfaces = attachment.interfaces.iter().filter(|interface| ports.contains_key(&***interface));
        interfaces.map(|interface| port(attachment, interface))
    });
    Ok(all.collect())
}

/// An entry of a CNI result's `interfaces`. It is an interface of the node if it names no sandbox.
#[derive(Debug, Deserialize)]
pub(super) struct CniInterface {
    #[serde(default)]
    name: String,
    #[serde(default)]
    mac: Option<String>,
    #[serde(default)]
    sandbox: Option<String>,
}

impl CniInterface {
    fn is_host_side(&self) -> bool {
        self.sandbox.as_ref().is_none_or(String::is_empty)
    }
}

/// Returns the names of the node's interfaces, and the MAC address of the pod's interface `pod_interface`.
pub(super) fn split_interfaces(interfaces: &[CniInterface], pod_interface: &str) -> (Vec<Arc<str>>, Option<[u8; 6]>) {
    let on_node = interfaces.iter().filter(|interface| interface.is_host_side() && !interface.name.is_empty());
    let in_pod = interfaces.iter().find(|interface| !interface.is_host_side() && interface.name == pod_interface);
    let mac = in_pod.and_then(|interface| parse_mac(interface.mac.as_ref()?));
    (on_node.map(|interface| interface.name.as_str().into()).collect(), mac)
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>().ok()?;
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sandbox_separates_node_and_pod_interfaces() {
        let json = r#"[{"name": "cni0", "mac": "aa:56:81:1c:cf:9b"}, {"name": "veth1", "mac": "ee:00:00:00:00:01",
            "sandbox": ""}, {"name": "eth0", "mac": "0a:00:00:00:00:01", "sandbox": "/run/netns/a"}]"#;
        let interfaces: Vec<CniInterface> = serde_json::from_str(json).unwrap();
        assert_eq!(
            split_interfaces(&interfaces, "eth0"),
            (vec!["cni0".into(), "veth1".into()], Some([10, 0, 0, 0, 0, 1]))
        );
        assert_eq!(split_interfaces(&interfaces, "net1").1, None);
    }

    #[test]
    fn malformed_mac_address_is_none() {
        for text in ["", "0a:00:00:00:00", "0a:00:00:00:00:01:02", "0a:00:00:00:00:zz"] {
            assert_eq!(parse_mac(text), None, "{text}");
        }
    }
}
