//! CNI records.

use std::net::IpAddr;

use crate::attribute::{
    Event, cni,
    pod::Pod,
    pod_index::{Owner, PodIndex, Record},
};

pub fn check(data: &[u8]) {
    let Ok(record) = cni::parse(data, "net-1198af-eth0") else { return };
    let text = String::from_utf8_lossy(data);
    assert!(text.contains("K8S_POD_UID") || text.contains("\\u"), "a file that names no pod is a record: {text}");
    let addresses: Vec<IpAddr> = record.addresses.iter().map(IpAddr::to_canonical).collect();
    assert!(!addresses.is_empty() && !record.addresses.iter().any(IpAddr::is_loopback), "{record:?}");

    // A record alone does not make any pod the owner of an address.
    let neighbor = Pod::sample("b", "uid-b", "sa", &["203.0.113.7"]);
    let mut index = PodIndex::default();
    index.apply(Event::ListStarted);
    index.apply(Event::Pod(neighbor.clone()));
    index.apply(Event::Record(Record::sample("net-b-eth0", "uid-b", "203.0.113.7")));
    index.apply(Event::ListDone);
    let (own, id, stranger) = (neighbor.addresses[0], record.id.clone(), *record.pod.0 != *"uid-b");
    index.apply(Event::Record(record));
    for address in &addresses {
        let owner = index.owner(*address);
        assert!(!stranger || !matches!(owner, Owner::Pod(_)), "{owner:?} by the record of an unknown pod");
    }
    let is_neighbor = |owner| matches!(owner, Owner::Pod(pod) if *pod == neighbor);
    let may_differ = !stranger || addresses.contains(&own);
    assert!(is_neighbor(index.owner(own)) || may_differ, "another pod lost its address");
    index.apply(Event::RecordDeleted(id));
    assert!(is_neighbor(index.owner(own)) || !stranger, "a deleted record has no effect");
}
