//! The workloads file.

use std::collections::HashSet;

use crate::attribute::{
    Event, file,
    pod_index::{Owner, PodIndex},
};

/// Start of the corpus's misplaced tokens.
const TOKEN: &str = "eyJhbGciOiJSUzI1NiJ9";

pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match file::parse(text) {
        Ok(workloads) => {
            let mut addresses = HashSet::new();
            let mut index = PodIndex::default();
            index.apply(Event::ListStarted);
            for workload in &workloads {
                assert!(!workload.pod.addresses.is_empty());
                for address in &workload.pod.addresses {
                    assert!(addresses.insert(address.to_canonical()), "two workloads have {address}");
                }
                assert!(workload.role.is_none() || workload.token_file.as_ref().is_some_and(|file| file.is_absolute()));
                index.apply(Event::Pod(workload.pod.clone()));
            }
            index.apply(Event::ListDone);
            let uids: HashSet<_> = workloads.iter().map(|workload| &workload.pod.uid).collect();
            for workload in workloads.iter().filter(|_| uids.len() == workloads.len()) {
                for address in &workload.pod.addresses {
                    let owner = index.owner(address.to_canonical());
                    assert_eq!(owner, Owner::Pod(workload.pod.clone().into()), "{address}");
                }
            }
        }
        Err(wrong) => {
            let wrong = format!("{wrong:#}");
            assert!(!wrong.contains(TOKEN), "{wrong}");
        }
    }
}
