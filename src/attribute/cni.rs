//! The node's CNI records: they map addresses to pods before a pod's first instruction runs.
//!
//! libcni, used by containerd and CRI-O, writes `/var/lib/cni/results/<network>-<sandbox id>-<ifname>` when CNI ADD
//! returns and deletes it at CNI DEL ("cniCacheV1",
//! <https://github.com/containernetworking/cni/blob/main/libcni/api.go>). Any other file in that directory (partial,
//! unreadable, huge or foreign) is skipped and counted, never fatal.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs::{DirEntry, File},
    io::{self, BufReader, Read},
    net::IpAddr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt;
use inotify::{EventMask, Inotify, WatchMask};
use nix::errno::Errno;
use serde::Deserialize;
use serde_json::error::Category;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::{
    Attributor, Event, PodUid,
    attachment::{self, Attachment, CniInterface},
    pod_index::Record,
};
use crate::{clock::UnixTime, observe::Metrics};

/// Maximum size of a record. Records contain the pod's annotations (256 KiB, up to six times that when escaped in JSON)
/// and all its host ports. The parser skips unused fields, so a large record needs no memory.
const MAX_SIZE: u64 = 64 << 20;
/// Interval between attempts to watch the directory, which does not exist on a node that never ran a pod.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Polling interval while the directory cannot be watched. A reassigned address must be known before its new pod
/// starts.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Reads the directory of records once before pods are listed, then watches it.
#[derive(Debug)]
pub struct RecordWatcher {
    directory: PathBuf,
    /// Read once, since the kernel's boot time moves when the clock is set.
    boot: UnixTime,
    /// Replaceable for tests.
    inotify: fn() -> io::Result<Inotify>,
    attributor: Arc<Attributor>,
    metrics: Metrics,
}

/// The reason why a file of the directory is not used as a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Skip {
    /// Out of file descriptors or memory: says nothing about the file.
    OutOfResources,
    Unreadable,
    TooLarge,
    NotJson,
    Foreign,
    Loopback,
}

impl Skip {
    fn label(self) -> &'static str {
        match self {
            Self::OutOfResources => "out_of_resources",
            Self::Unreadable => "unreadable",
            Self::TooLarge => "too_large",
            Self::NotJson => "not_json",
            Self::Foreign => "foreign",
            Self::Loopback => "loopback",
        }
    }
}

impl RecordWatcher {
    pub fn new(directory: PathBuf, attributor: Arc<Attributor>, metrics: Metrics) -> Self {
        Self { directory, boot: boot_time(), inotify: Inotify::init, attributor, metrics }
    }

    /// Reads all records. Call it before pods are listed: a record that exists by then and names none of them is stale.
    pub fn scan(&self) {
        match self.read_all() {
            Ok(count) => info!(directory = %self.directory.display(), files = count, "CNI records were read"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => info!(
                directory = %self.directory.display(), %error,
                "no CNI records yet: until then, pods are identified once the API server reports their address"
            ),
            Err(error) => warn!(
                directory = %self.directory.display(), %error,
                "CNI records cannot be read: pods are identified once the API server reports their address, which may \
                 be seconds after they start. Check that kirsa runs as root and that root owns the directory; set \
                 --cni-results none if the runtime writes no records"
            ),
        }
    }

    /// Watches the directory until dropped, also when it is deleted and recreated. Polls a directory that cannot be
    /// watched: addresses are reassigned, so stale records are unsafe.
    pub async fn follow(self) {
        let mut warned = false;
        loop {
            let ended = self.watch_directory().await;
            self.metrics.cni_followed.set(0);
            let Err(error) = ended else {
                warned = false;
                continue;
            };
            if error.kind() != io::ErrorKind::NotFound && !std::mem::replace(&mut warned, true) {
                warn!(
                    directory = %self.directory.display(), %error,
                    "CNI records cannot be watched: polling them every 50 ms instead. Check the limits of file \
                     descriptors and of inotify instances (fs.inotify.max_user_instances)"
                );
            }
            self.poll_for(RETRY_DELAY).await;
        }
    }

    /// Polls for `duration`: reads all records again when a name, a size or a modification time has changed.
    async fn poll_for(&self, duration: Duration) {
        let mut seen = None;
        let end = Instant::now() + duration;
        while Instant::now() < end {
            let current = self.fingerprint().ok();
            if current != seen
                && let Err(error) = self.read_all()
            {
                debug!(directory = %self.directory.display(), %error, "CNI records cannot be read yet");
            } else {
                seen = current;
            }
            sleep(POLL_INTERVAL).await;
        }
    }

    fn fingerprint(&self) -> io::Result<BTreeMap<OsString, (i64, i64, u64)>> {
        let fingerprint = |entry: io::Result<DirEntry>| {
            let entry = entry?;
            let metadata = entry.metadata()?;
            Ok((entry.file_name(), (metadata.mtime(), metadata.mtime_nsec(), metadata.len())))
        };
        std::fs::read_dir(&self.directory)?.map(fingerprint).collect()
    }

    async fn watch_directory(&self) -> io::Result<()> {
        let inotify = (self.inotify)()?;
        inotify.watches().add(
            &self.directory,
            WatchMask::CLOSE_WRITE
                | WatchMask::MOVED_TO
                | WatchMask::DELETE
                | WatchMask::MOVED_FROM
                | WatchMask::DELETE_SELF
                | WatchMask::MOVE_SELF,
        )?;
        // Read after the watch is set up, so that no change is missed.
        self.read_all()?;
        self.metrics.cni_followed.set(1);
        let mut events = inotify.into_event_stream(vec![0; 16 << 10])?;
        while let Some(event) = events.next().await {
            let event = event?;
            if event.mask.contains(EventMask::Q_OVERFLOW) {
                warn!(
                    directory = %self.directory.display(),
                    "inotify queue of CNI records overflowed: reading all records again"
                );
                return Ok(());
            }
            if event.mask.intersects(EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED) {
                return Ok(());
            }
            let Some(id) = event.name.as_deref().and_then(|name| name.to_str()) else { continue };
            if event.mask.intersects(EventMask::DELETE | EventMask::MOVED_FROM) {
                self.attributor.apply(Event::RecordDeleted(id.into()));
            } else {
                self.read_one(id)?;
            }
        }
        Ok(())
    }

    fn read_all(&self) -> io::Result<usize> {
        let entries = std::fs::read_dir(&self.directory).inspect_err(|error| {
            // The directory was deleted with all its records, of which inotify may not have reported each.
            if error.kind() == io::ErrorKind::NotFound {
                self.attributor.apply(Event::RecordsSnapshot(Vec::new()));
            }
        })?;
        self.attributor.apply(Event::ScanStarted);
        let mut present = Vec::new();
        for entry in entries {
            if let Ok(name) = entry?.file_name().into_string() {
                self.read_one(&name)?;
                present.push(Arc::<str>::from(name));
            }
        }
        let count = present.len();
        self.attributor.apply(Event::RecordsSnapshot(present));
        Ok(count)
    }

    /// Reads one record. After an error, the caller reads the whole directory again.
    ///
    /// # Errors
    /// If the agent is out of file descriptors or memory.
    fn read_one(&self, id: &str) -> io::Result<()> {
        match read(&self.directory.join(id), id, self.boot) {
            Ok(record) => {
                if record.before_boot {
                    self.metrics.cni_skipped("before_boot");
                }
                self.attributor.apply(Event::Record(record));
            }
            Err(Skip::OutOfResources) => {
                self.metrics.cni_skipped(Skip::OutOfResources.label());
                // Keep the known record: without it, the pod would lose its address.
                return Err(io::Error::other("out of file descriptors or memory while reading a CNI record"));
            }
            Err(skip) => {
                self.metrics.cni_skipped(skip.label());
                // Keep the known record of that sandbox until the file is deleted: unreadable is not deleted.
                debug!(file = id, reason = skip.label(), "file is not used as a CNI record");
            }
        }
        Ok(())
    }
}

/// Reads a directory's records, and returns where their pods are attached to the node.
///
/// # Errors
/// If the directory cannot be listed.
pub fn attachments(directory: &Path) -> io::Result<BTreeSet<Attachment>> {
    let boot = boot_time();
    let names = std::fs::read_dir(directory)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let records = names.filter_map(|name| read(&directory.join(&name), &name, boot).ok());
    Ok(records.filter_map(|record| Attachment::from_record(&record)).collect())
}

fn read(path: &Path, id: &str, boot: UnixTime) -> Result<Record, Skip> {
    let file = File::open(path).map_err(|error| skip_reason(&error))?;
    let metadata = file.metadata().map_err(|error| skip_reason(&error))?;
    if !metadata.is_file() {
        return Err(Skip::Foreign);
    }
    if metadata.len() > MAX_SIZE {
        return Err(Skip::TooLarge);
    }
    // A reboot leaves records behind and reassigns their addresses. A time in the future proves nothing.
    let before_boot = unix_time(metadata.mtime()) < boot;
    Ok(Record { before_boot, ..parse(BufReader::new(file.take(MAX_SIZE)), id)? })
}

fn unix_time(seconds: i64) -> UnixTime {
    UnixTime(u64::try_from(seconds).unwrap_or(0))
}

fn skip_reason(error: &io::Error) -> Skip {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM) => Skip::OutOfResources,
        _ => Skip::Unreadable,
    }
}

/// The fields in use of libcni's cache entry.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CacheEntry {
    kind: String,
    if_name: String,
    #[serde(default)]
    cni_args: Vec<(String, String)>,
    result: CniResult,
}

#[derive(Deserialize)]
struct CniResult {
    #[serde(default)]
    ips: Vec<CniIp>,
    #[serde(default)]
    interfaces: Option<Vec<CniInterface>>,
}

#[derive(Deserialize)]
struct CniIp {
    address: String,
}

pub(crate) fn parse(json: impl Read, id: &str) -> Result<Record, Skip> {
    let entry: CacheEntry = serde_json::from_reader(json).map_err(|error| match error.classify() {
        Category::Data => Skip::Foreign,
        Category::Io => skip_reason(&error.into()),
        Category::Syntax | Category::Eof => Skip::NotJson,
    })?;
    if entry.kind != "cniCacheV1" {
        return Err(Skip::Foreign);
    }
    let pod = entry.cni_args.iter().find(|(key, _)| key == "K8S_POD_UID").ok_or(Skip::Foreign)?;
    let addresses: Vec<IpAddr> = entry
        .result
        .ips
        .iter()
        .map(|ip| ip.address.split('/').next().unwrap_or_default().parse())
        .collect::<Result<_, _>>()
        .map_err(|_| Skip::Foreign)?;
    if addresses.is_empty() || addresses.iter().all(IpAddr::is_loopback) {
        return Err(Skip::Loopback);
    }
    let (interfaces, mac) =
        attachment::split_interfaces(entry.result.interfaces.as_deref().unwrap_or_default(), &entry.if_name);
    Ok(Record {
        id: id.into(),
        pod: PodUid(pod.1.as_str().into()),
        interface: entry.if_name.into(),
        interfaces,
        mac,
        addresses: addresses.into_iter().filter(|address| !address.is_loopback()).collect(),
        before_boot: false,
    })
}

/// Returns when this node booted; 0 (no record is older than the boot) if the kernel does not tell.
fn boot_time() -> UnixTime {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let boot = stat.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok());
    UnixTime(boot.unwrap_or(0))
}

#[cfg(test)]
mod tests {
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
}
