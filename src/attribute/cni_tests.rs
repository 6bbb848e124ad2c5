use nix::sys::{
    stat::futimens,
    time::{TimeSpec, TimeValLike},
};

use super::*;
use crate::{attribute::pod::Pod, intercept::ClientConn};

/// A record of containerd 2.4, shortened.
const BRIDGE: &str = r#"{"kind":"cniCacheV1","containerId":"1198af","config":"eyJ9","ifName":"eth0",
    "networkName":"kit","netns":"/var/run/netns/cni-68b0","cniArgs":[["K8S_POD_UID","794615a3"],
    ["IgnoreUnknown","1"],["K8S_POD_NAMESPACE","default"],["K8S_POD_NAME","reader"]],
    "capabilityArgs":{"cgroupPath":"/kubepods/pod794615a3"},"result":{"cniVersion":"1.0.0",
    "ips":[{"address":"10.244.0.2/24","gateway":"10.244.0.1","interface":2},{"address":"fd00::2/64"}]}}"#;

#[test]
fn record_names_pod_and_addresses() {
    let record = parse(BRIDGE.as_bytes(), "kit-1198af-eth0").unwrap();
    assert_eq!((&*record.pod.0, &*record.interface), ("794615a3", "eth0"));
    assert_eq!(record.addresses, ["10.244.0.2", "fd00::2"].map(|ip| ip.parse::<IpAddr>().unwrap()));
}

/// Writes a file with this modification time.
fn write_dated(path: &Path, content: &str, modified: i64) {
    std::fs::write(path, content).unwrap();
    let time = TimeSpec::seconds(modified);
    futimens(File::options().write(true).open(path).unwrap(), &time, &time).unwrap();
}

fn read_dated(name: &str, content: &str, modified: i64, boot: UnixTime) -> Result<Record, Skip> {
    let path = std::env::temp_dir().join(format!("kirsa-{name}-{}", std::process::id()));
    write_dated(&path, content, modified);
    let record = read(&path, "kit-1198af-eth0", boot);
    std::fs::remove_file(&path).unwrap();
    record
}

/// Go's JSON encoder writes `<` as six bytes: 256 KiB of it become 1.5 MiB, plus the host ports.
#[test]
fn record_of_5_mib_is_readable() {
    let ports = r#"{"hostPort":8080,"containerPort":8080,"protocol":"tcp","hostIP":""},"#.repeat(56_000);
    let args = format!(
        r#""capabilityArgs":{{"portMappings":[{}],"a":"{}","#,
        ports.trim_end_matches(','),
        "\\u003c".repeat(256 << 10)
    );
    let large = BRIDGE.replace(r#""capabilityArgs":{"#, &args);
    assert!(large.len() > 5 << 20, "{}", large.len());
    let record = read_dated("large", &large, 1, UnixTime(0));
    assert_eq!(&*record.unwrap().pod.0, "794615a3");
}

#[test]
fn only_records_older_than_boot_are_marked() {
    let boot = UnixTime(1_700_000_000);
    for (modified, before_boot) in [(1_699_999_999, true), (1_700_000_000, false), (4_000_000_000, false)] {
        let record = read_dated(&format!("dated-{modified}"), BRIDGE, modified, boot).unwrap();
        assert_eq!(record.before_boot, before_boot, "{modified}");
        assert_eq!(record, Record { before_boot, ..parse(BRIDGE.as_bytes(), "kit-1198af-eth0").unwrap() });
    }
}

/// The clock goes back by an hour between two records of an address.
#[tokio::test(start_paused = true)]
async fn clock_set_back_reorders_no_records() {
    let directory = std::env::temp_dir().join(format!("kirsa-clock-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    let (attributor, _) = Attributor::new(Metrics::new("test").unwrap());
    let records = RecordWatcher::new(directory.clone(), attributor.clone(), Metrics::new("test").unwrap());
    let write = |id: &str, uid: &str, after_boot: i64| {
        write_dated(
            &directory.join(id),
            &BRIDGE.replace("794615a3", uid),
            i64::try_from(records.boot.0).unwrap() + after_boot,
        );
        records.scan();
    };
    write("kit-1-eth0", "gone", 7_200);
    attributor.apply(Event::ListStarted);
    attributor.apply(Event::Pod(Pod::sample("a", "uid-a", "sa", &[])));
    attributor.apply(Event::ListDone);
    write("kit-2-eth0", "uid-a", 3_600);
    let peer = ClientConn::from_pod("10.244.0.2".parse().unwrap());
    assert_eq!(attributor.lookup(&peer).unwrap().pod(), "a");
    std::fs::remove_dir_all(&directory).unwrap();
}

/// The node is out of inotify instances: an address must still move to its next pod.
#[tokio::test(start_paused = true)]
async fn records_are_polled_without_inotify() {
    let directory = std::env::temp_dir().join(format!("kirsa-records-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    let write = |id: &str, uid: &str| {
        std::fs::write(directory.join(id), BRIDGE.replace("794615a3", uid)).unwrap();
    };
    let (attributor, _) = Attributor::new(Metrics::new("test").unwrap());
    attributor.apply(Event::ListStarted);
    for uid in ["uid-a", "uid-b"] {
        attributor.apply(Event::Pod(Pod::sample(uid, uid, "sa", &[])));
    }
    attributor.apply(Event::ListDone);
    write("a", "uid-a");
    let mut records = RecordWatcher::new(directory.clone(), attributor.clone(), Metrics::new("test").unwrap());
    records.inotify = || Err(Errno::EMFILE.into());
    records.scan();
    let peer = ClientConn::from_pod("10.244.0.2".parse().unwrap());
    std::fs::write(directory.join("a"), &BRIDGE[..100]).unwrap();
    records.scan();
    assert!(attributor.lookup(&peer).is_ok(), "an unreadable record is not deleted");
    write("a", "uid-a");
    let follow = tokio::spawn(records.follow());
    assert_eq!(attributor.lookup(&peer).unwrap().pod(), "uid-a");

    std::fs::remove_file(directory.join("a")).unwrap();
    write("b", "uid-b");
    let is_b = async {
        while !attributor.lookup(&peer).is_ok_and(|owner| owner.pod() == "uid-b") {
            sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), is_b).await.expect("the address moves to b");

    std::fs::remove_dir_all(&directory).unwrap();
    let is_unknown = async {
        while attributor.lookup(&peer).is_ok() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), is_unknown)
        .await
        .expect("deleting the directory deletes its records");
    follow.abort();
}

#[test]
fn descriptor_exhaustion_is_no_unreadable_record() {
    assert_eq!(skip_reason(&io::Error::from(Errno::EMFILE)), Skip::OutOfResources);
    assert_eq!(skip_reason(&io::Error::from(Errno::ENOENT)), Skip::Unreadable);
}

#[test]
fn other_files_are_skipped_with_reason() {
    let change = |from: &str, to: &str| parse(BRIDGE.replace(from, to).as_bytes(), "x").unwrap_err();
    assert_eq!(parse(&BRIDGE.as_bytes()[..100], "x"), Err(Skip::NotJson), "partial");
    assert_eq!(parse(&b""[..], "x"), Err(Skip::NotJson));
    assert_eq!(parse(&b"[]"[..], "x"), Err(Skip::Foreign));
    assert_eq!(change("cniCacheV1", "cniCacheV9"), Skip::Foreign);
    assert_eq!(change("K8S_POD_UID", "K8S_POD"), Skip::Foreign);
    assert_eq!(change("10.244.0.2/24", "10.244.0.1.2/24"), Skip::Foreign);
    let loopback = BRIDGE.replace("10.244.0.2/24", "127.0.0.1/8").replace("fd00::2/64", "::1/128");
    assert_eq!(parse(loopback.as_bytes(), "x"), Err(Skip::Loopback));
}
