//! Capabilities: what this process was given is what the agent's container was given.

use caps::{CapSet, Capability, CapsHashSet};

use super::finding::Finding;
use crate::intercept::Backend;

const CHECK: &str = "capabilities";

pub(super) fn check(backend: Backend) -> Finding {
    let held = match caps::read(None, CapSet::Permitted) {
        Ok(held) => held,
        Err(error) => return Finding::skipped(CHECK, format!("cannot be read: {error}")),
    };
    judge(backend, &held)
}

fn judge(backend: Backend, held: &CapsHashSet) -> Finding {
    use Capability::{CAP_NET_ADMIN, CAP_NET_RAW};
    let (needed, useful): (&[_], &[_]) = match backend {
        Backend::None => (&[], &[]),
        Backend::Nft => (&[CAP_NET_ADMIN], &[CAP_NET_ADMIN]),
        // The legacy iptables tools talk to the kernel through a raw socket.
        Backend::Iptables | Backend::Auto => (&[CAP_NET_ADMIN], &[CAP_NET_ADMIN, CAP_NET_RAW]),
    };
    if let Some(missing) = needed.iter().find(|capability| !held.contains(capability)) {
        return Finding::failed(
            CHECK,
            format!("{missing} is missing: the redirect can be neither applied nor tried"),
            "securityContext.capabilities: {drop: [ALL], add: [NET_ADMIN]} (daemonset/base/daemonset.yaml)",
        );
    }
    let names = |of: &[Capability]| of.iter().map(Capability::to_string).collect::<Vec<_>>().join(", ");
    let needed = if needed.is_empty() { "none is needed".to_owned() } else { format!("{} is there", names(needed)) };
    let mut beyond: Vec<Capability> = held.iter().filter(|capability| !useful.contains(capability)).copied().collect();
    beyond.sort_unstable_by_key(|capability| capability.index());
    if beyond.is_empty() {
        return Finding::ok(CHECK, format!("{needed}, and nothing that is not needed"));
    }
    let beyond = if beyond.len() > 16 { format!("{} others", beyond.len()) } else { names(&beyond) };
    Finding::warning(
        CHECK,
        format!("{needed}; not needed: {beyond}"),
        "give the container only what it needs (daemonset/base/daemonset.yaml); the agent drops the rest when it starts",
    )
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Verdict, *};

    #[test]
    fn what_is_missing_fails_and_what_is_too_much_is_named() {
        let held = |capabilities: &[Capability]| capabilities.iter().copied().collect::<CapsHashSet>();
        let admin = held(&[Capability::CAP_NET_ADMIN]);
        assert_eq!(judge(Backend::Nft, &held(&[])).verdict, Verdict::Failed);
        assert_eq!(judge(Backend::Nft, &admin).verdict, Verdict::Ok);
        assert_eq!(judge(Backend::None, &held(&[])).verdict, Verdict::Ok);
        assert_eq!(judge(Backend::None, &admin).verdict, Verdict::Warning);
        let more = held(&[Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW, Capability::CAP_SYS_ADMIN]);
        assert!(judge(Backend::Iptables, &more).detail.ends_with("not needed: CAP_SYS_ADMIN"));
        assert!(judge(Backend::Nft, &more).detail.ends_with("not needed: CAP_NET_RAW, CAP_SYS_ADMIN"));
    }
}
