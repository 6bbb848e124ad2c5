//! Why a connection may have come around the redirect, for the log.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::netlink::interface_routes;

/// Connections around the redirect may come as often as they like; rules change with pods.
const REFRESH: Duration = Duration::from_secs(10);
/// A node has as many as it has pods with security groups of their own, and each twice.
const NAMED: usize = 4;

/// Explains such connections by the node's policy routing, as it was in the last seconds.
#[derive(Debug, Default)]
pub(super) struct Around(Mutex<Option<(Instant, Arc<str>)>>);

impl Around {
    pub(super) fn detail(&self) -> Arc<str> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
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
        detail.push_str("; this node routes pods by interface, around the redirect: ");
        detail.push_str(&routes[..routes.len().min(NAMED)].join(", "));
    }
    if routes.len() > NAMED {
        detail.push_str(&format!(", and {} more", routes.len() - NAMED));
    }
    detail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_are_named_up_to_a_limit() {
        assert_eq!(detail(&[]), "connected to an address of the node");
        let routes: Vec<String> = (0..6).map(|number| format!("iif vlan.eth.{number} lookup 10{number}")).collect();
        let detail = detail(&routes);
        assert!(detail.contains("iif vlan.eth.3 lookup 103, and 2 more") && !detail.contains("vlan.eth.4"), "{detail}");
    }
}
