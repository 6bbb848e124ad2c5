//! Explains in the log why a connection may have bypassed the redirect.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::netlink::interface_routes;

/// Lifetime of the cached explanation. Clients cannot make the agent read the kernel's rules more often.
const REFRESH: Duration = Duration::from_secs(10);
/// Maximum number of routes to name. A node has two for each pod with its own security group.
const MAX_NAMED: usize = 4;

/// Explanation from the node's policy routing, cached for a few seconds.
#[derive(Debug, Default)]
pub(super) struct BypassDetail(Mutex<Option<(Instant, Arc<str>)>>);

impl BypassDetail {
    pub(super) fn get(&self) -> Arc<str> {
        let mut last = self.0.lock();
        match &*last {
            Some((read, detail)) if read.elapsed() < REFRESH => detail.clone(),
            _ => {
                let routes = interface_routes().unwrap_or_default();
                let names: Vec<String> = routes.iter().map(ToString::to_string).collect();
                let detail: Arc<str> = detail(&names).into();
                *last = Some((Instant::now(), detail.clone()));
                detail
            }
        }
    }
}

fn detail(routes: &[String]) -> String {
    let mut detail = String::from("connected to an address of the node");
    if !routes.is_empty() {
        detail.push_str("; policy routing by interface bypasses the redirect: ");
        detail.push_str(&routes[..routes.len().min(MAX_NAMED)].join(", "));
    }
    if routes.len() > MAX_NAMED {
        detail.push_str(&format!(", and {} more", routes.len() - MAX_NAMED));
    }
    detail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_of_named_routes_is_bounded() {
        assert_eq!(detail(&[]), "connected to an address of the node");
        let routes: Vec<String> = (0..6).map(|number| format!("iif vlan.eth.{number} lookup 10{number}")).collect();
        let detail = detail(&routes);
        assert!(detail.contains("iif vlan.eth.3 lookup 103, and 2 more") && !detail.contains("vlan.eth.4"), "{detail}");
    }
}
