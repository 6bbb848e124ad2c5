//! Checks that the bridge guard covers every pod port of a shared Linux bridge.

use std::{collections::BTreeSet, path::Path};

use super::finding::Finding;
use crate::{
    attribute::{cni, pod_ports},
    config::{Config, Source},
    intercept::{
        Backend, bridge_ports,
        rule::{BridgeGuard, PodPort},
    },
};

const CHECK: &str = "bridge-ports";
const NO_BRIDGE: &str = "no pod on this node is attached to a shared Linux bridge";
const DROP_NET_RAW: &str = "drop NET_RAW in pods (as the restricted Pod Security level does), or use a CNI plugin that \
                            checks source addresses";

pub(super) fn check(config: &Config) -> Finding {
    let Source::Kubernetes { cni_results: Some(folder), .. } = &config.source else {
        return check_without_records();
    };
    match ports(folder) {
        Ok(ports) if ports.is_empty() => Finding::ok(CHECK, NO_BRIDGE),
        Ok(ports) => check_guard(config, &ports),
        Err(error) => Finding::skipped(CHECK, format!("{}: {error}", folder.display())),
    }
}

/// Reports bridges when no CNI record says which of their ports belong to pods.
fn check_without_records() -> Finding {
    let bridges: BTreeSet<String> = bridge_ports().unwrap_or_default().into_values().collect();
    if bridges.is_empty() {
        return Finding::ok(CHECK, NO_BRIDGE);
    }
    let bridges = bridges.into_iter().collect::<Vec<_>>().join(" and ");
    let detail = format!("the agent reads no CNI records, so no port of {bridges} is guarded");
    Finding::skipped(CHECK, detail).with_fix(format!("if these ports belong to pods: {DROP_NET_RAW}"))
}

fn ports(folder: &Path) -> std::io::Result<BTreeSet<PodPort>> {
    match cni::attachments(folder) {
        Ok(attachments) => pod_ports(&attachments),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeSet::new()),
        Err(error) => Err(error),
    }
}

fn check_guard(config: &Config, ports: &BTreeSet<PodPort>) -> Finding {
    let what = format!("{} ports of {} belong to pods", ports.len(), bridges(ports));
    let guard = config.rules().bridge_guard();
    // With these backends, a guard in the kernel is a leftover that no agent maintains.
    let listing = match config.intercept {
        Backend::Iptables | Backend::None => Err(String::new()),
        Backend::Auto | Backend::Nft => guard.listing().map_err(|error| format!("{error:#}")),
    };
    match listing {
        Ok(listing) => match missing(ports, &listing) {
            Some(port) => Finding::warning(
                CHECK,
                format!("{what}, and the guard lacks {port}"),
                "the agent adds a port when its CNI record appears, and rechecks every 30 s: if the port stays \
                 missing, check the agent's log",
            ),
            None => check_ingress(guard, what),
        },
        Err(error) if error.contains("not permitted") => Finding::skipped(CHECK, format!("{what}; {error}")),
        Err(_) => {
            let detail = format!(
                "{what} and are not guarded: a pod there with CAP_NET_RAW (a runtime default) can get its neighbors' \
                 credentials"
            );
            let fix = match config.intercept {
                Backend::Iptables | Backend::None => {
                    format!("use --intercept nft, the only backend with the guard, or {DROP_NET_RAW}")
                }
                Backend::Auto | Backend::Nft => {
                    format!("the agent's log says why nft cannot apply the guard; until it can, {DROP_NET_RAW}")
                }
            };
            Finding::warning(CHECK, detail, fix)
        }
    }
}

fn check_ingress(guard: BridgeGuard, what: String) -> Finding {
    if guard.has_ingress() {
        return Finding::ok(CHECK, format!("{what} and are guarded"));
    }
    let detail = format!("{what} and are guarded, but not against LLDP frames that move a neighbor's MAC address");
    let fix = format!("use Linux 5.5 or newer with nftables for family netdev, or {DROP_NET_RAW}");
    Finding::warning(CHECK, detail, fix)
}

/// Returns a port that the guard does not list.
fn missing(ports: &BTreeSet<PodPort>, listing: &str) -> Option<String> {
    let is_known = |port: &&PodPort| listing.contains(&format!("\"{}\"", port.interface));
    ports.iter().find(|port| !is_known(port)).map(|port| port.interface.to_string())
}

fn bridges(ports: &BTreeSet<PodPort>) -> String {
    let all = bridge_ports().unwrap_or_default();
    let bridges: BTreeSet<&str> =
        ports.iter().filter_map(|port| all.get(&*port.interface)).map(String::as_str).collect();
    bridges.into_iter().collect::<Vec<_>>().join(" and ")
}
