//! Pods on a shared Linux bridge: does the guard know all of their ports?

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
const NONE: &str = "no pod of this node is on a shared Linux bridge";
const DROP: &str = "drop NET_RAW in pods (the restricted Pod Security level does), or use a CNI that checks source \
                    addresses";

pub(super) fn check(config: &Config) -> Finding {
    let Source::Kubernetes { cni_results: Some(folder), .. } = &config.source else {
        return without_records();
    };
    match ports(folder) {
        Ok(ports) if ports.is_empty() => Finding::ok(CHECK, NONE),
        Ok(ports) => guarded(config, &ports),
        Err(error) => Finding::skipped(CHECK, format!("{}: {error}", folder.display())),
    }
}

/// Which ports are pods' cannot be told.
fn without_records() -> Finding {
    let bridges: BTreeSet<String> = bridge_ports().unwrap_or_default().into_values().collect();
    if bridges.is_empty() {
        return Finding::ok(CHECK, NONE);
    }
    let bridges = bridges.into_iter().collect::<Vec<_>>().join(" and ");
    let detail = format!("no CNI records are read, so no port of {bridges} is guarded");
    Finding::skipped(CHECK, detail).with_fix(format!("where these are pods' ports: {DROP}"))
}

fn ports(folder: &Path) -> std::io::Result<BTreeSet<PodPort>> {
    match cni::attachments(folder) {
        Ok(attachments) => pod_ports(&attachments),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeSet::new()),
        Err(error) => Err(error),
    }
}

fn guarded(config: &Config, ports: &BTreeSet<PodPort>) -> Finding {
    let what = format!("{} ports of {} belong to pods", ports.len(), bridges(ports));
    let guard = config.rules().bridge_guard();
    // Where another agent left a guard, nothing keeps it.
    let listing = match config.intercept {
        Backend::Iptables | Backend::None => Err(String::new()),
        Backend::Auto | Backend::Nft => guard.listing().map_err(|error| format!("{error:#}")),
    };
    match listing {
        Ok(listing) => match missing(ports, &listing) {
            Some(port) => Finding::warning(
                CHECK,
                format!("{what}, and the guard lacks {port}"),
                "the agent adds a port when its record appears, and looks again within 30 s: if it stays away, the \
                 agent's log says why",
            ),
            None => ingress(guard, what),
        },
        Err(error) if error.contains("not permitted") => Finding::skipped(CHECK, format!("{what}; {error}")),
        Err(_) => {
            let detail = format!(
                "{what}, and nothing guards them: a pod there with CAP_NET_RAW (a runtime default) gets its neighbors' \
                 credentials"
            );
            let fix = match config.intercept {
                Backend::Iptables | Backend::None => {
                    format!("use --intercept nft, which alone has the guard, or {DROP}")
                }
                Backend::Auto | Backend::Nft => {
                    format!("the agent's log says why nft cannot apply the guard; until it can, {DROP}")
                }
            };
            Finding::warning(CHECK, detail, fix)
        }
    }
}

fn ingress(guard: BridgeGuard, what: String) -> Finding {
    if guard.has_ingress() {
        return Finding::ok(CHECK, format!("{what}, and are guarded"));
    }
    let detail = format!("{what} and are guarded, but not against LLDP that moves a neighbor's MAC address");
    Finding::warning(CHECK, detail, format!("needs Linux 5.5 and nftables for family netdev; without them, {DROP}"))
}

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
