//! The node's own CNI records: which pod has which address, known before the pod's first instruction.
//!
//! libcni, in containerd as in CRI-O, writes `/var/lib/cni/results/<network>-<sandbox id>-<ifname>` when CNI ADD
//! returns and removes it at CNI DEL (`libcni/api.go`, "cniCacheV1"). Whatever else lies in that folder, half-written,
//! unreadable, huge or foreign, is skipped and counted, never fatal.

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
    directory::Record,
};
use crate::observe::Metrics;

/// Records carry the pod's annotations (256 KiB, which JSON may write as six times that) and host ports, as many as
/// fit into an object of the API server's. What is not needed is skipped while parsing, so size costs no memory.
const MAX_SIZE: u64 = 64 << 20;
/// How soon it is tried again to follow what could not be followed. A node that never ran a pod has no folder.
const RETRY: Duration = Duration::from_secs(1);
/// Between two looks until then. An address that is dealt anew must be another pod's here before that pod has started.
const LOOK: Duration = Duration::from_millis(50);

/// The folder of records, read once before anything that could contradict it, then followed.
#[derive(Debug)]
pub struct Records {
    folder: PathBuf,
    /// Asked for once: by the kernel, this moment moves when the clock is set.
    boot: i64,
    inotify: fn() -> io::Result<Inotify>,
    attributor: Arc<Attributor>,
    metrics: Metrics,
}

/// Why a file of the folder is not a record of a pod's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Skip {
    /// For want of file descriptors or memory: nothing that the file says.
    NotNow,
    Unreadable,
    TooLarge,
    NotJson,
    Foreign,
    Loopback,
}

impl Skip {
    fn label(self) -> &'static str {
        match self {
            Self::NotNow => "not_now",
            Self::Unreadable => "unreadable",
            Self::TooLarge => "too_large",
            Self::NotJson => "not_json",
            Self::Foreign => "foreign",
            Self::Loopback => "loopback",
        }
    }
}

impl Records {
    pub fn new(folder: PathBuf, attributor: Arc<Attributor>, metrics: Metrics) -> Self {
        Self { folder, boot: boot_time(), inotify: Inotify::init, attributor, metrics }
    }

    /// Reads what is there. To be done before the pods are listed: what lies here then and names none of them is
    /// stale.
    pub fn scan(&self) {
        match self.read_all() {
            Ok(count) => info!(folder = %self.folder.display(), files = count, "CNI records read"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => info!(
                folder = %self.folder.display(), %error,
                "no CNI records yet; until there are, pods are known when the API server shows their address"
            ),
            Err(error) => warn!(
                folder = %self.folder.display(), %error,
                "CNI records cannot be read: pods are known when the API server shows their address, which may be \
                 seconds after they have started. Is the folder root's, and is this root? --cni-results none if there \
                 are none"
            ),
        }
    }

    /// Follows the folder, through its removal and return, until dropped. What cannot be followed is looked at: what is
    /// known of it must not grow old, since addresses change hands.
    pub async fn follow(self) {
        let mut told = false;
        loop {
            let ended = self.follow_once().await;
            self.metrics.cni_followed.set(0);
            let Err(error) = ended else {
                told = false;
                continue;
            };
            if error.kind() != io::ErrorKind::NotFound && !std::mem::replace(&mut told, true) {
                warn!(
                    folder = %self.folder.display(), %error,
                    "CNI records cannot be followed; looking at them every 50 ms instead. Is a file descriptor or an \
                     inotify instance to be had (fs.inotify.max_user_instances)?"
                );
            }
            self.look_for(RETRY).await;
        }
    }

    /// Reads all again whenever a name, a size or a time of modification has changed.
    async fn look_for(&self, long: Duration) {
        let mut seen = None;
        let end = Instant::now() + long;
        while Instant::now() < end {
            let there = self.appearance().ok();
            if there != seen
                && let Err(error) = self.read_all()
            {
                debug!(folder = %self.folder.display(), %error, "CNI records cannot be read now");
            } else {
                seen = there;
            }
            sleep(LOOK).await;
        }
    }

    fn appearance(&self) -> io::Result<BTreeMap<OsString, (i64, i64, u64)>> {
        let looks = |entry: io::Result<DirEntry>| {
            let entry = entry?;
            let about = entry.metadata()?;
            Ok((entry.file_name(), (about.mtime(), about.mtime_nsec(), about.len())))
        };
        std::fs::read_dir(&self.folder)?.map(looks).collect()
    }

    async fn follow_once(&self) -> io::Result<()> {
        let inotify = (self.inotify)()?;
        inotify.watches().add(
            &self.folder,
            WatchMask::CLOSE_WRITE
                | WatchMask::MOVED_TO
                | WatchMask::DELETE
                | WatchMask::MOVED_FROM
                | WatchMask::DELETE_SELF
                | WatchMask::MOVE_SELF,
        )?;
        // Only now, so that nothing falls between reading and following.
        self.read_all()?;
        self.metrics.cni_followed.set(1);
        let mut events = inotify.into_event_stream(vec![0; 16 << 10])?;
        while let Some(event) = events.next().await {
            let event = event?;
            if event.mask.contains(EventMask::Q_OVERFLOW) {
                warn!(folder = %self.folder.display(), "too many changes of CNI records at once: reading them all again");
                return Ok(());
            }
            if event.mask.intersects(EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED) {
                return Ok(());
            }
            let Some(id) = event.name.as_deref().and_then(|name| name.to_str()) else { continue };
            if event.mask.intersects(EventMask::DELETE | EventMask::MOVED_FROM) {
                self.attributor.apply(Event::RecordGone(id.into()));
            } else {
                self.read_one(id)?;
            }
        }
        Ok(())
    }

    fn read_all(&self) -> io::Result<usize> {
        let entries = std::fs::read_dir(&self.folder).inspect_err(|error| {
            // Gone with all that was in it, whether or not somebody was told of each file.
            if error.kind() == io::ErrorKind::NotFound {
                self.attributor.apply(Event::RecordsAre(Vec::new()));
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
        self.attributor.apply(Event::RecordsAre(present));
        Ok(count)
    }

    /// An error is to be followed by another look at the whole folder.
    fn read_one(&self, id: &str) -> io::Result<()> {
        match read(&self.folder.join(id), id, self.boot) {
            Ok(record) => {
                if record.before_boot {
                    self.metrics.cni_skipped("before_boot");
                }
                self.attributor.apply(Event::Record(record));
            }
            Err(Skip::NotNow) => {
                self.metrics.cni_skipped(Skip::NotNow.label());
                // What is known of it stays: a pod whose record is gone would lose its address.
                return Err(io::Error::other("no file descriptor or memory to read a CNI record with"));
            }
            Err(skip) => {
                self.metrics.cni_skipped(skip.label());
                // An unreadable record is not a removed one: what is known of that sandbox stays until the file goes.
                debug!(file = id, reason = skip.label(), "CNI record skipped");
            }
        }
        Ok(())
    }
}

/// Where the pods of a folder's records are attached to the node, as the records say now.
///
/// # Errors
/// The folder cannot be listed.
pub fn attachments(folder: &Path) -> io::Result<BTreeSet<Attachment>> {
    let boot = boot_time();
    let names = std::fs::read_dir(folder)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let records = names.filter_map(|name| read(&folder.join(&name), &name, boot).ok());
    Ok(records.filter_map(|record| Attachment::of(&record)).collect())
}

fn read(path: &Path, id: &str, boot: i64) -> Result<Record, Skip> {
    let file = File::open(path).map_err(|error| unread(&error))?;
    let metadata = file.metadata().map_err(|error| unread(&error))?;
    if !metadata.is_file() {
        return Err(Skip::Foreign);
    }
    if metadata.len() > MAX_SIZE {
        return Err(Skip::TooLarge);
    }
    // A reboot leaves records behind, and deals the addresses anew. A time in the future says nothing.
    let before_boot = metadata.mtime() < boot;
    Ok(Record { before_boot, ..parse(BufReader::new(file.take(MAX_SIZE)), id)? })
}

fn unread(error: &io::Error) -> Skip {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM) => Skip::NotNow,
        _ => Skip::Unreadable,
    }
}

/// What is needed of libcni's cache entry.
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
        Category::Io => unread(&error.into()),
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
    let (interfaces, mac) = attachment::ends(entry.result.interfaces.as_deref().unwrap_or_default(), &entry.if_name);
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

/// When this node booted, in seconds since the epoch; 0 (everything counts) where the kernel does not say.
fn boot_time() -> i64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    stat.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use nix::sys::{
        stat::futimens,
        time::{TimeSpec, TimeValLike},
    };

    use super::*;
    use crate::{attribute::pod::Pod, intercept::Peer};

    /// As containerd 2.4 leaves it, shortened.
    const BRIDGE: &str = r#"{"kind":"cniCacheV1","containerId":"1198af","config":"eyJ9","ifName":"eth0",
        "networkName":"kit","netns":"/var/run/netns/cni-68b0","cniArgs":[["K8S_POD_UID","794615a3"],
        ["IgnoreUnknown","1"],["K8S_POD_NAMESPACE","default"],["K8S_POD_NAME","reader"]],
        "capabilityArgs":{"cgroupPath":"/kubepods/pod794615a3"},"result":{"cniVersion":"1.0.0",
        "ips":[{"address":"10.244.0.2/24","gateway":"10.244.0.1","interface":2},{"address":"fd00::2/64"}]}}"#;

    #[test]
    fn a_record_names_the_pod_and_its_addresses() {
        let record = parse(BRIDGE.as_bytes(), "kit-1198af-eth0").unwrap();
        assert_eq!((&*record.pod.0, &*record.interface), ("794615a3", "eth0"));
        assert_eq!(record.addresses, ["10.244.0.2", "fd00::2"].map(|ip| ip.parse::<IpAddr>().unwrap()));
    }

    /// Writes a file that was modified then.
    fn write_dated(path: &Path, content: &str, modified: i64) {
        std::fs::write(path, content).unwrap();
        let time = TimeSpec::seconds(modified);
        futimens(File::options().write(true).open(path).unwrap(), &time, &time).unwrap();
    }

    fn read_dated(name: &str, content: &str, modified: i64, boot: i64) -> Result<Record, Skip> {
        let path = std::env::temp_dir().join(format!("kirsa-{name}-{}", std::process::id()));
        write_dated(&path, content, modified);
        let record = read(&path, "kit-1198af-eth0", boot);
        std::fs::remove_file(&path).unwrap();
        record
    }

    /// Go's JSON writes `<` as six bytes: 256 KiB of it make 1.5 MiB. Host ports come on top.
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
        let record = read_dated("large", &large, 1, 0);
        assert_eq!(&*record.unwrap().pod.0, "794615a3");
    }

    #[test]
    fn clock_decides_only_what_is_older_than_the_boot() {
        let boot = 1_700_000_000;
        for (modified, before_boot) in [(1_699_999_999, true), (1_700_000_000, false), (4_000_000_000, false)] {
            let record = read_dated(&format!("dated-{modified}"), BRIDGE, modified, boot).unwrap();
            assert_eq!(record.before_boot, before_boot, "{modified}");
            assert_eq!(record, Record { before_boot, ..parse(BRIDGE.as_bytes(), "kit-1198af-eth0").unwrap() });
        }
    }

    /// The clock goes back by an hour between two records of an address.
    #[tokio::test(start_paused = true)]
    async fn clock_set_back_reorders_no_records() {
        let folder = std::env::temp_dir().join(format!("kirsa-clock-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let (attributor, _) = Attributor::new(Metrics::new("test").unwrap());
        let records = Records::new(folder.clone(), attributor.clone(), Metrics::new("test").unwrap());
        let write = |id: &str, uid: &str, after_boot: i64| {
            write_dated(&folder.join(id), &BRIDGE.replace("794615a3", uid), records.boot + after_boot);
            records.scan();
        };
        write("kit-1-eth0", "gone", 7_200);
        attributor.apply(Event::ListStarted);
        attributor.apply(Event::Pod(Pod::sample("a", "uid-a", "sa", &[])));
        attributor.apply(Event::ListDone);
        write("kit-2-eth0", "uid-a", 3_600);
        let peer = Peer::from_pod("10.244.0.2".parse().unwrap());
        assert_eq!(attributor.peek(&peer).unwrap().pod(), "a");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    /// The node's inotify instances are used up: whoever had an address must not keep it.
    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_followed_is_looked_at() {
        let folder = std::env::temp_dir().join(format!("kirsa-records-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let write = |id: &str, uid: &str| {
            std::fs::write(folder.join(id), BRIDGE.replace("794615a3", uid)).unwrap();
        };
        let (attributor, _) = Attributor::new(Metrics::new("test").unwrap());
        attributor.apply(Event::ListStarted);
        for uid in ["uid-a", "uid-b"] {
            attributor.apply(Event::Pod(Pod::sample(uid, uid, "sa", &[])));
        }
        attributor.apply(Event::ListDone);
        write("a", "uid-a");
        let mut records = Records::new(folder.clone(), attributor.clone(), Metrics::new("test").unwrap());
        records.inotify = || Err(Errno::EMFILE.into());
        records.scan();
        let peer = Peer::from_pod("10.244.0.2".parse().unwrap());
        std::fs::write(folder.join("a"), &BRIDGE[..100]).unwrap();
        records.scan();
        assert!(attributor.peek(&peer).is_ok(), "an unreadable record is not a removed one");
        write("a", "uid-a");
        let follow = tokio::spawn(records.follow());
        assert_eq!(attributor.peek(&peer).unwrap().pod(), "uid-a");

        std::fs::remove_file(folder.join("a")).unwrap();
        write("b", "uid-b");
        let is_b = async {
            while !attributor.peek(&peer).is_ok_and(|owner| owner.pod() == "uid-b") {
                sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), is_b).await.expect("it is b's");

        std::fs::remove_dir_all(&folder).unwrap();
        let is_nobodys = async {
            while attributor.peek(&peer).is_ok() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), is_nobodys).await.expect("with the folder its records are gone");
        follow.abort();
    }

    #[test]
    fn want_of_file_descriptors_is_nothing_that_a_record_says() {
        assert_eq!(unread(&io::Error::from(Errno::EMFILE)), Skip::NotNow);
        assert_eq!(unread(&io::Error::from(Errno::ENOENT)), Skip::Unreadable);
    }

    #[test]
    fn what_is_no_record_is_skipped_and_says_why() {
        let change = |from: &str, to: &str| parse(BRIDGE.replace(from, to).as_bytes(), "x").unwrap_err();
        assert_eq!(parse(&BRIDGE.as_bytes()[..100], "x"), Err(Skip::NotJson), "half-written");
        assert_eq!(parse(&b""[..], "x"), Err(Skip::NotJson));
        assert_eq!(parse(&b"[]"[..], "x"), Err(Skip::Foreign));
        assert_eq!(change("cniCacheV1", "cniCacheV9"), Skip::Foreign);
        assert_eq!(change("K8S_POD_UID", "K8S_POD"), Skip::Foreign);
        assert_eq!(change("10.244.0.2/24", "10.244.0.1.2/24"), Skip::Foreign);
        let loopback = BRIDGE.replace("10.244.0.2/24", "127.0.0.1/8").replace("fd00::2/64", "::1/128");
        assert_eq!(parse(loopback.as_bytes(), "x"), Err(Skip::Loopback));
    }
}
