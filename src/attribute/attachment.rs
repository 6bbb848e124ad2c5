//! Where a pod is attached to the node, by its CNI record.

use std::{collections::BTreeSet, io, net::IpAddr, sync::Arc};

use serde::Deserialize;

use super::directory::Record;
use crate::intercept::{bridge_ports, rule::PodPort};

/// The node's end of a pod's network, and what the pod may call itself there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attachment {
    /// Interfaces of the node that the plugin made or used: the host end of the veth, and its bridge.
    pub interfaces: Vec<Arc<str>>,
    /// MAC address of the pod's own interface.
    pub mac: Option<[u8; 6]>,
    pub addresses: Vec<IpAddr>,
}

impl Attachment {
    pub(super) fn of(record: &Record) -> Option<Self> {
        let attachment =
            Self { interfaces: record.interfaces.clone(), mac: record.mac, addresses: record.addresses.clone() };
        (!attachment.interfaces.is_empty()).then_some(attachment)
    }
}

/// Attachments whose interface is a port of a bridge now.
///
/// # Errors
/// The kernel's.
pub fn pod_ports(attachments: &BTreeSet<Attachment>) -> io::Result<BTreeSet<PodPort>> {
    if attachments.is_empty() {
        return Ok(BTreeSet::new());
    }
    let of_bridges = bridge_ports()?;
    let port = |attachment: &Attachment, interface: &Arc<str>| PodPort {
        interface: interface.clone(),
        mac: attachment.mac,
        addresses: attachment.addresses.clone(),
    };
    let all = attachments.iter().flat_map(|attachment| {
        let interfaces = attachment.interfaces.iter().filter(|interface| of_bridges.contains_key(&***interface));
        interfaces.map(|interface| port(attachment, interface))
    });
    Ok(all.collect())
}

/// One of a CNI result's `interfaces`: the node's if it names no sandbox.
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
    fn is_of_node(&self) -> bool {
        self.sandbox.as_ref().is_none_or(String::is_empty)
    }
}

/// The node's interfaces, and the MAC address of the pod's own.
pub(super) fn ends(interfaces: &[CniInterface], own: &str) -> (Vec<Arc<str>>, Option<[u8; 6]>) {
    let of_node = interfaces.iter().filter(|interface| interface.is_of_node() && !interface.name.is_empty());
    let own = interfaces.iter().find(|interface| !interface.is_of_node() && interface.name == own);
    (of_node.map(|interface| interface.name.as_str().into()).collect(), own.and_then(|own| mac(own.mac.as_ref()?)))
}

fn mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>().ok()?;
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_apart_by_the_sandbox() {
        let json = r#"[{"name": "cni0", "mac": "aa:56:81:1c:cf:9b"}, {"name": "veth1", "mac": "ee:00:00:00:00:01",
            "sandbox": ""}, {"name": "eth0", "mac": "0a:00:00:00:00:01", "sandbox": "/run/netns/a"}]"#;
        let interfaces: Vec<CniInterface> = serde_json::from_str(json).unwrap();
        assert_eq!(ends(&interfaces, "eth0"), (vec!["cni0".into(), "veth1".into()], Some([10, 0, 0, 0, 0, 1])));
        assert_eq!(ends(&interfaces, "net1").1, None);
    }

    #[test]
    fn malformed_mac_addresses_are_none() {
        for text in ["", "0a:00:00:00:00", "0a:00:00:00:00:01:02", "0a:00:00:00:00:zz"] {
            assert_eq!(mac(text), None, "{text}");
        }
    }
}
