//! Checks capabilities and the protection of the port. This process has the capabilities of the agent's container.

use caps::{CapSet, Capability, CapsHashSet};

use super::finding::Finding;
use crate::intercept::{Backend, port};

const CHECK: &str = "capabilities";

/// The sysctl that decides which ports need a capability.
const SYSCTL: &str = "net.ipv4.ip_unprivileged_port_start";

pub(super) fn check(backend: Backend, port: u16) -> Finding {
    let held = match caps::read(None, CapSet::Permitted) {
        Ok(held) => held,
        Err(error) => return Finding::skipped(CHECK, format!("capabilities cannot be read: {error}")),
    };
    judge(backend, port < port::first_unprivileged(), &held)
}

/// Checks that listening on the agent's port requires a capability.
pub(super) fn check_port(port: u16) -> Finding {
    judge_port(port, port::first_unprivileged())
}

fn judge_port(port: u16, first: u16) -> Finding {
    let default = port::DEFAULT_PORT;
    match port::takeover_risk(port, first) {
        None => Finding::ok("port", format!("listening on port {port} requires CAP_NET_BIND_SERVICE")),
        Some(risk) if port < 1_024 => Finding::warning("port", risk, format!("set {SYSCTL} to 1024 on the node")),
        Some(risk) => Finding::warning("port", risk, format!("set --port below {first}, such as {default}")),
    }
}

fn judge(backend: Backend, privileged_port: bool, held: &CapsHashSet) -> Finding {
    use Capability::{CAP_NET_ADMIN, CAP_NET_BIND_SERVICE, CAP_NET_RAW};
    let bind: &[_] = if privileged_port { &[CAP_NET_BIND_SERVICE] } else { &[] };
    let (rules, tools): (&[_], &[_]) = match backend {
        Backend::None => (&[], &[]),
        Backend::Nft => (&[CAP_NET_ADMIN], &[]),
        // The legacy iptables tools use a raw socket to talk to the kernel.
        Backend::Iptables | Backend::Auto => (&[CAP_NET_ADMIN], &[CAP_NET_RAW]),
    };
    let needed = [rules, bind].concat();
    let useful = [&needed, tools].concat();
    if let Some(missing) = needed.iter().find(|capability| !held.contains(capability)) {
        let consequence = match missing {
            CAP_NET_BIND_SERVICE => "the agent cannot listen on its port",
            _ => "the redirect can be neither applied nor tested",
        };
        return Finding::failed(
            CHECK,
            format!("{missing} is missing: {consequence}"),
            "securityContext.capabilities: {drop: [ALL], add: [NET_ADMIN, NET_BIND_SERVICE]} \
             (daemonset/base/daemonset.yaml)",
        );
    }
    let names =
        |capabilities: &[Capability]| capabilities.iter().map(Capability::to_string).collect::<Vec<_>>().join(", ");
    let needed = match &needed[..] {
        [] => "no capability is needed".to_owned(),
        [one] => format!("{one} is granted"),
        several => format!("{} are granted", names(several)),
    };
    let mut excess: Vec<Capability> = held.iter().filter(|capability| !useful.contains(capability)).copied().collect();
    excess.sort_unstable_by_key(|capability| capability.index());
    if excess.is_empty() {
        return Finding::ok(CHECK, format!("{needed}, and none that is not needed"));
    }
    let excess = if excess.len() > 16 { format!("{} others", excess.len()) } else { names(&excess) };
    Finding::warning(
        CHECK,
        format!("{needed}; not needed: {excess}"),
        "grant the container only the needed capabilities (daemonset/base/daemonset.yaml); the agent drops the others \
         at start",
    )
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Verdict, *};

    #[test]
    fn missing_capability_fails_and_excess_warns() {
        let held = |capabilities: &[Capability]| capabilities.iter().copied().collect::<CapsHashSet>();
        let admin = held(&[Capability::CAP_NET_ADMIN]);
        assert_eq!(judge(Backend::Nft, false, &held(&[])).verdict, Verdict::Failed);
        assert_eq!(judge(Backend::Nft, false, &admin).verdict, Verdict::Ok);
        assert_eq!(judge(Backend::None, false, &held(&[])).verdict, Verdict::Ok);
        assert_eq!(judge(Backend::None, false, &admin).verdict, Verdict::Warning);
        let more = held(&[Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW, Capability::CAP_SYS_ADMIN]);
        assert!(judge(Backend::Iptables, false, &more).detail.ends_with("not needed: CAP_SYS_ADMIN"));
        assert!(judge(Backend::Nft, false, &more).detail.ends_with("not needed: CAP_NET_RAW, CAP_SYS_ADMIN"));
    }

    #[test]
    fn privileged_port_needs_its_capability() {
        let held = |capabilities: &[Capability]| capabilities.iter().copied().collect::<CapsHashSet>();
        let bind = held(&[Capability::CAP_NET_BIND_SERVICE]);
        assert_eq!(judge(Backend::None, true, &bind).verdict, Verdict::Ok);
        assert_eq!(judge(Backend::None, false, &bind).verdict, Verdict::Warning);
        let without = judge(Backend::Nft, true, &held(&[Capability::CAP_NET_ADMIN]));
        assert!(without.verdict == Verdict::Failed && without.detail.contains("cannot listen"), "{without:?}");
    }

    #[test]
    fn unprivileged_port_warns() {
        assert_eq!(judge_port(338, 1_024).verdict, Verdict::Ok);
        assert!(judge_port(8_181, 1_024).fix.is_some_and(|fix| fix.contains("--port")));
        assert!(judge_port(338, 0).fix.is_some_and(|fix| fix.contains(SYSCTL)));
    }
}
