//! CNI records.

use std::net::IpAddr;

use crate::attribute::{
    Event, cni,
    directory::{Directory, Owner, Record},
    pod::Pod,
};

pub fn check(data: &[u8]) {
    let Ok(record) = cni::parse(data, "net-1198af-eth0") else { return };
    let text = String::from_utf8_lossy(data);
    assert!(text.contains("K8S_POD_UID") || text.contains("\\u"), "nothing is a record that names no pod: {text}");
    let addresses: Vec<IpAddr> = record.addresses.iter().map(IpAddr::to_canonical).collect();
    assert!(!addresses.is_empty() && !record.addresses.iter().any(IpAddr::is_loopback), "{record:?}");

    // Whoever it names: a record alone makes nobody the owner of an address.
    let neighbour = Pod::sample("b", "uid-b", "sa", &["203.0.113.7"]);
    let mut directory = Directory::default();
    directory.apply(Event::ListStarted);
    directory.apply(Event::Pod(neighbour.clone()));
    directory.apply(Event::Record(Record::sample("net-b-eth0", "uid-b", "203.0.113.7")));
    directory.apply(Event::ListDone);
    let (own, id, stranger) = (neighbour.addresses[0], record.id.clone(), *record.pod.0 != *"uid-b");
    directory.apply(Event::Record(record));
    for address in &addresses {
        let owner = directory.owner(*address);
        assert!(!stranger || !matches!(owner, Owner::Pod(_)), "{owner:?} by a record of nobody's");
    }
    let is_neighbours = |owner| matches!(owner, Owner::Pod(pod) if *pod == neighbour);
    let may_differ = !stranger || addresses.contains(&own);
    assert!(is_neighbours(directory.owner(own)) || may_differ, "another pod lost its address");
    directory.apply(Event::RecordGone(id));
    assert!(is_neighbours(directory.owner(own)) || !stranger, "as if it had never been");
}
