//! Workloads from a YAML file: kirsa without Kubernetes, for a laptop, systemd-nspawn or Nomad. They enter the same pod
//! index, so all later stages are the same. A malformed file changes nothing: the last valid one stays in effect.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, anyhow};
use futures::StreamExt;
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use serde::Deserialize;
use serde_saphyr::Spanned;
use tracing::{debug, error, info};

use super::{
    Attributor, Event,
    pod::{Pod, PodUid, ServiceAccountName},
};
use crate::clock::UnixTime;

/// Interval between attempts to watch the file's directory again after it was removed.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// An entry of the file: a pod, and the configuration that its service account would have in Kubernetes.
#[derive(Debug, Clone)]
pub struct FileWorkload {
    pub pod: Pod,
    pub role: Option<String>,
    pub token_file: Option<PathBuf>,
    pub annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    workloads: Vec<Spanned<Entry>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Entry {
    pod: String,
    #[serde(default = "default_name")]
    namespace: String,
    #[serde(default = "default_name")]
    service_account: String,
    addresses: Vec<IpAddr>,
    #[serde(default)]
    role: Option<String>,
    #[serde(default)]
    token_file: Option<PathBuf>,
    #[serde(default)]
    uid: Option<String>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

fn default_name() -> String {
    "default".into()
}

/// Parses the file's content.
///
/// # Errors
/// If the content is no valid list of workloads. The message names the line and the fix, and contains no tokens.
pub fn parse(text: &str) -> anyhow::Result<Vec<FileWorkload>> {
    // The error quotes invalid keys and values, and one of them may be a misplaced token.
    parse_document(text).map_err(|error| anyhow!(redact_tokens(&format!("{error:#}"))))
}

/// Replaces everything that may be a JWT: `eyJ` is the start of its base64url-encoded JSON header.
fn redact_tokens(text: &str) -> String {
    let (mut redacted, mut rest) = (String::with_capacity(text.len()), text);
    while let Some((before, token)) = rest.split_once("eyJ") {
        let end = token.find(|c: char| !(c.is_ascii_alphanumeric() || "-_.".contains(c))).unwrap_or(token.len());
        redacted.push_str(before);
        redacted.push_str("[redacted]");
        rest = &token[end..];
    }
    redacted + rest
}

fn parse_document(text: &str) -> anyhow::Result<Vec<FileWorkload>> {
    // Errors have the line number without the line: a misplaced token must not get into the log.
    let options = serde_saphyr::options! { with_snippet: false };
    let document: Document = serde_saphyr::from_str_with_options(text, options).map_err(|error| anyhow!("{error}"))?;
    let mut owners: HashMap<IpAddr, String> = HashMap::new();
    let mut names: HashMap<String, u64> = HashMap::new();
    let mut workloads = Vec::new();
    for Spanned { value: entry, referenced, .. } in document.workloads {
        let line = referenced.line();
        let name = format!("{}/{}", entry.namespace, entry.pod);
        if let Some(first) = names.insert(name.clone(), line) {
            return Err(anyhow!("line {line}: workload {name} is already defined on line {first}"));
        }
        if entry.addresses.is_empty() {
            return Err(anyhow!(
                "line {line}: workload {name} has no address; list the addresses that it connects from"
            ));
        }
        for address in &entry.addresses {
            if let Some(other) = owners.insert(address.to_canonical(), name.clone()) {
                return Err(anyhow!("line {line}: address {address} of workload {name} already belongs to {other}"));
            }
        }
        if entry.role.is_some() && entry.token_file.is_none() {
            return Err(anyhow!(
                "line {line}: workload {name} has a role but no tokenFile; set it to the file of its web identity token"
            ));
        }
        if entry.token_file.as_ref().is_some_and(|file| !file.is_absolute()) {
            // Not quoted: the value may be the token itself.
            return Err(anyhow!("line {line}: tokenFile of workload {name} must be an absolute path"));
        }
        let workload = FileWorkload {
            pod: Pod {
                uid: PodUid(entry.uid.unwrap_or(name).into()),
                name: entry.pod.into(),
                account: ServiceAccountName { namespace: entry.namespace.into(), name: entry.service_account.into() },
                addresses: entry.addresses,
                host_network: false,
                mirror_of: None,
                ended: false,
                created: UnixTime(0),
            },
            role: entry.role,
            token_file: entry.token_file,
            annotations: entry.annotations,
        };
        // A service account has one role, which must not depend on the order of the entries.
        let same_account = |other: &&FileWorkload| other.pod.account == workload.pod.account;
        if let Some(other) = workloads.iter().find(same_account)
            && (&other.role, &other.token_file, &other.annotations)
                != (&workload.role, &workload.token_file, &workload.annotations)
        {
            return Err(anyhow!(
                "line {line}: service account {} has a different role, tokenFile or annotations than in an earlier \
                 workload; give this workload its own serviceAccount",
                workload.pod.account
            ));
        }
        workloads.push(workload);
    }
    Ok(workloads)
}

/// Replaces the pods of the index by those of the file.
pub fn apply(workloads: &[FileWorkload], attributor: &Attributor) {
    attributor.apply(Event::ListStarted);
    for workload in workloads {
        attributor.apply(Event::Pod(workload.pod.clone()));
    }
    attributor.apply(Event::ListDone);
}

/// Reads and parses the file.
///
/// # Errors
/// If the file cannot be read or is malformed. The message names the file, the line and the fix.
pub fn read(file: &Path) -> anyhow::Result<Vec<FileWorkload>> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("--workloads {}: cannot read file", file.display()))?;
    parse(&text).with_context(|| format!("--workloads {}", file.display()))
}

/// Watches the file and calls `changed` with each valid version, until dropped.
///
/// # Errors
/// If the file's directory cannot be watched at the start.
pub async fn follow(file: PathBuf, mut changed: impl FnMut(Vec<FileWorkload>)) -> anyhow::Result<()> {
    let mut events = watch(&file)?;
    let mut last: Option<Arc<str>> = None;
    loop {
        match std::fs::read_to_string(&file) {
            Ok(text) if last.as_deref() == Some(&*text) => {}
            Ok(text) => {
                match parse(&text) {
                    Ok(workloads) => {
                        let count = workloads.len();
                        changed(workloads);
                        info!(file = %file.display(), workloads = count, "workloads file was read");
                    }
                    Err(error) => error!(
                        file = %file.display(), error = format!("{error:#}"),
                        "workloads file is malformed: its last valid version stays in effect"
                    ),
                }
                last = Some(text.into());
            }
            Err(error) => {
                error!(
                    file = %file.display(), %error,
                    "workloads file cannot be read: its last valid version stays in effect"
                );
            }
        }
        let gone = EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED;
        if events.next().await.is_none_or(|event| event.is_ok_and(|event| event.mask.intersects(gone))) {
            // The directory was replaced: the last version stays in effect until there is a new one.
            events = loop {
                tokio::time::sleep(RETRY_DELAY).await;
                match watch(&file) {
                    Ok(events) => break events,
                    Err(error) => debug!(error = format!("{error:#}"), "workloads file cannot be watched yet"),
                }
            };
        }
    }
}

/// Watches the directory rather than the file, since editors and ConfigMap volumes replace the file by renaming.
fn watch(file: &Path) -> anyhow::Result<EventStream<Vec<u8>>> {
    let directory = file.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let inotify = Inotify::init()?;
    let mask = WatchMask::CLOSE_WRITE
        | WatchMask::MOVED_TO
        | WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF;
    inotify.watches().add(directory, mask).with_context(|| format!("cannot watch {}", directory.display()))?;
    Ok(inotify.into_event_stream(vec![0; 4 << 10])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "workloads:
- pod: reader-0
  serviceAccount: reader
  addresses: [10.0.0.2, 'fd00::2']
  role: arn:aws:iam::111122223333:role/reader
  tokenFile: /run/tokens/reader
- pod: idle
  namespace: tools
  addresses: [10.0.0.3]
";

    #[test]
    fn entries_become_pods_of_service_accounts() {
        let workloads = parse(GOOD).unwrap();
        assert_eq!(workloads[0].pod.account.to_string(), "default/reader");
        assert_eq!(workloads[0].pod.addresses.len(), 2);
        assert_eq!((workloads[1].pod.account.to_string().as_str(), &workloads[1].role), ("tools/default", &None));
    }

    #[test]
    fn malformed_file_names_line_and_fix() {
        for (from, to, named) in [
            ("10.0.0.3]", "10.0.0.2]", "line 7: address 10.0.0.2"),
            ("10.0.0.3]", "]", "line 7: workload tools/idle has no address"),
            ("10.0.0.3]", "10.0.0.x]", "line 9"),
            ("  tokenFile: /run/tokens/reader\n", "", "line 2: workload default/reader-0 has a role but no tokenFile"),
            (
                "pod: idle\n  namespace: tools",
                "pod: reader-0",
                "line 7: workload default/reader-0 is already defined on line 2",
            ),
            (
                "/run/tokens/reader",
                "eyJhbGciOi.eyJpc3Mi.c2ln",
                "line 2: tokenFile of workload default/reader-0 must be",
            ),
            (
                "pod: idle\n  namespace: tools",
                "pod: idle\n  serviceAccount: reader",
                "line 7: service account default/reader",
            ),
            ("serviceAccount:", "serviceAcount:", "serviceAcount"),
            ("workloads:", "workloads: [", "line"),
        ] {
            let error = format!("{:#}", parse(&GOOD.replace(from, to)).unwrap_err());
            assert!(error.contains(named) && !error.contains("eyJ"), "{named}: {error}");
        }
    }

    /// Configuration management replaces whole directories.
    #[tokio::test(start_paused = true)]
    async fn replaced_directory_is_watched_again() {
        let parent = std::env::temp_dir().join(format!("kirsa-workloads-{}", std::process::id()));
        let (directory, file) = (parent.join("now"), parent.join("now/workloads.yaml"));
        let entry = |pod: &str| format!("workloads:\n- {{pod: {pod}, serviceAccount: sa, addresses: [10.0.0.2]}}\n");
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(&file, entry("a")).unwrap();
        let (sender, mut versions) = tokio::sync::mpsc::unbounded_channel();
        let following = tokio::spawn(follow(file.clone(), move |workloads| sender.send(workloads).unwrap()));
        assert_eq!(&*versions.recv().await.unwrap()[0].pod.name, "a");
        let next = parent.join("next");
        std::fs::create_dir(&next).unwrap();
        std::fs::write(next.join("workloads.yaml"), entry("b")).unwrap();
        std::fs::rename(&directory, parent.join("old")).unwrap();
        std::fs::rename(&next, &directory).unwrap();
        assert_eq!(&*versions.recv().await.unwrap()[0].pod.name, "b");
        std::fs::write(&file, entry("c")).unwrap();
        assert_eq!(&*versions.recv().await.unwrap()[0].pod.name, "c", "the new directory is watched");
        following.abort();
        std::fs::remove_dir_all(&parent).unwrap();
    }
}
