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
#[path = "cni_tests.rs"]
mod tests;
