//! Polls the node's service for what is allowed. Each schedule has its own interval and backoff, so that a path that
//! fails or hangs delays no other.

use std::{collections::BTreeSet, time::Duration};

use anyhow::anyhow;
use bytes::Bytes;
use futures::{StreamExt, future, stream};
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::{
    NodeMetadata,
    groups::{DEVICES, INTERFACE_ENTRIES, INTERFACES, MAC, STATIC_INTERVAL, TAGS, is_device, is_mac, is_tag_key},
    source::{FetchError, Source},
};
use crate::clock::Backoff;

const FIRST_RETRY: Duration = Duration::from_secs(1);
const MAX_RETRY: Duration = Duration::from_secs(300);
/// Maximum delay of a retry, in intervals: a late notice is useless.
const MAX_RETRY_INTERVALS: u32 = 5;
/// Maximum number of concurrent requests of one schedule.
const CONCURRENCY: usize = 4;
/// Maximum number of names in a listing. EC2 has fewer: 50 tags besides AWS's own, and no instance type has more
/// interfaces or volumes.
const MAX_NAMES: usize = 128;
/// Maximum length of a tag in bytes: 256 characters in UTF-8.
const MAX_TAG_VALUE: usize = 1_024;

/// Paths and folders that one schedule fetches.
#[derive(Debug)]
pub(super) enum FetchTarget {
    Values(Vec<String>),
    /// The MAC addresses of all interfaces, and the entries of the primary one.
    Interfaces,
    /// The names of the block devices.
    Devices,
    Tags,
}

#[derive(Debug)]
pub(super) struct Schedule {
    target: FetchTarget,
    interval: Duration,
    retry: Backoff,
}

type Failures = Vec<(String, FetchError)>;

impl Schedule {
    pub(super) fn new(target: FetchTarget, interval: Duration) -> Self {
        let retry = Backoff::new(FIRST_RETRY, MAX_RETRY.min(interval * MAX_RETRY_INTERVALS));
        Self { target, interval, retry }
    }

    /// Returns the paths that have been fetched after the first success; folders have a trailing slash.
    pub(super) fn paths(&self) -> Vec<String> {
        match &self.target {
            FetchTarget::Values(paths) => paths.clone(),
            FetchTarget::Interfaces => vec![MAC.to_owned(), INTERFACES.to_owned()],
            FetchTarget::Devices => vec![DEVICES.to_owned()],
            FetchTarget::Tags => vec![TAGS.to_owned()],
        }
    }

    pub(super) fn without(mut self, configured: &BTreeSet<String>) -> Self {
        if let FetchTarget::Values(paths) = &mut self.target {
            paths.retain(|path| !configured.contains(path));
        }
        self
    }

    /// Runs forever, unless there is nothing to fetch.
    pub(super) async fn run(mut self, metadata: &NodeMetadata, source: &impl Source) {
        let mut due = self.paths();
        let mut failing = None;
        while !due.is_empty() {
            let failures = match &self.target {
                FetchTarget::Values(_) => fetch_values(metadata, source, &due, |_| true).await,
                FetchTarget::Interfaces => fetch_interfaces(metadata, source).await,
                FetchTarget::Devices => fetch_devices(metadata, source).await,
                FetchTarget::Tags => fetch_tags(metadata, source).await,
            };
            if failures.is_empty() {
                if failing != Some(false) {
                    self.log_success();
                }
                failing = Some(false);
                self.retry.reset();
                due = self.paths();
                sleep(self.interval).await;
            } else {
                log_failures(&failures, failing == Some(true));
                failing = Some(true);
                due = failures.into_iter().map(|(path, _)| path).collect();
                sleep(self.retry.pause()).await;
            }
        }
    }

    fn log_success(&self) {
        let paths = self.paths();
        if self.interval == STATIC_INTERVAL {
            info!(paths = paths.len(), "node metadata read");
        } else {
            debug!(?paths, interval = ?self.interval, "node metadata of a group read");
        }
    }
}

/// Warns of the first of consecutive failures; logs the others at debug.
fn log_failures(failures: &Failures, repeated: bool) {
    for (path, error) in failures {
        match error {
            // Normal outside EC2, where --node-metadata-value configures values.
            FetchError::NoService(_) => debug!(path, %error, "the node's own metadata service does not respond"),
            FetchError::Failed(_) if repeated => debug!(path, %error, "fetching node metadata failed again"),
            FetchError::Failed(_) => warn!(path, %error, "fetching node metadata failed: retrying"),
        }
    }
}

/// Fetches values. Ignores invalid ones.
async fn fetch_values(
    metadata: &NodeMetadata,
    source: &impl Source,
    paths: &[String],
    is_valid: fn(&Bytes) -> bool,
) -> Failures {
    let fetches = paths.iter().cloned().map(|path| async move {
        let response = source.get(&path).await.map(|value| value.filter(is_valid));
        metadata.store(&path, response)
    });
    stream::iter(fetches).buffer_unordered(CONCURRENCY).filter_map(future::ready).collect().await
}

async fn fetch_interfaces(metadata: &NodeMetadata, source: &impl Source) -> Failures {
    let mac = source.get(MAC).await.and_then(|mac| match mac.as_deref().map(std::str::from_utf8) {
        Some(Ok(text)) if !is_mac(text) => Err(FetchError::Failed(anyhow!("not a MAC address"))),
        Some(Err(_)) => Err(FetchError::Failed(anyhow!("not a MAC address"))),
        _ => Ok(mac),
    });
    let failed = metadata.store(MAC, mac);
    // Without the MAC address the paths below are unknown.
    if let Some(failed) = failed {
        metadata.store(INTERFACES, Err(failed.1.duplicate()));
        return vec![failed];
    }
    let listed = match fetch_names(source, INTERFACES, |name| is_mac(name.trim_end_matches('/'))).await {
        Ok(listed) => listed,
        Err(failure) => return metadata.store(INTERFACES, Err(failure)).into_iter().collect(),
    };
    let listed: Vec<_> = listed.iter().map(|mac| format!("{}/", mac.trim_end_matches('/'))).collect();
    let primary = metadata.value(MAC).and_then(|mac| Some(format!("{}/", std::str::from_utf8(&mac).ok()?)));
    let primary = primary.filter(|mac| listed.contains(mac));
    let paths: Vec<_> = primary
        .iter()
        .flat_map(|mac| INTERFACE_ENTRIES.iter().map(move |name| format!("{INTERFACES}{mac}{name}")))
        .collect();
    metadata.store_listing(INTERFACES, &listed, &paths);
    fetch_values(metadata, source, &paths, |_| true).await
}

async fn fetch_devices(metadata: &NodeMetadata, source: &impl Source) -> Failures {
    match fetch_names(source, DEVICES, is_device).await {
        Ok(names) => metadata.store_listing(DEVICES, &names, &[]),
        Err(failure) => return metadata.store(DEVICES, Err(failure)).into_iter().collect(),
    }
    Vec::new()
}

async fn fetch_tags(metadata: &NodeMetadata, source: &impl Source) -> Failures {
    let keys = match fetch_names(source, TAGS, is_tag_key).await {
        Ok(keys) => keys,
        Err(failure) => return metadata.store(TAGS, Err(failure)).into_iter().collect(),
    };
    let paths: Vec<_> = keys.iter().map(|key| format!("{TAGS}{key}")).collect();
    metadata.store_listing(TAGS, &keys, &paths);
    fetch_values(metadata, source, &paths, is_tag_value).await
}

/// Fetches a listing. Returns its valid names; none if the node has no such folder.
async fn fetch_names(
    source: &impl Source,
    folder: &str,
    is_valid: impl Fn(&str) -> bool,
) -> Result<Vec<String>, FetchError> {
    let listing = source.get(folder).await?.unwrap_or_default();
    let listing = std::str::from_utf8(&listing).map_err(|error| FetchError::Failed(error.into()))?;
    let (valid, invalid): (Vec<_>, Vec<_>) = listing.lines().partition(|name| is_valid(name));
    let ignored = invalid.len() + valid.len().saturating_sub(MAX_NAMES);
    if ignored > 0 {
        debug!(folder, ignored, "the listing has invalid names, or too many: ignoring them");
    }
    Ok(valid.into_iter().take(MAX_NAMES).map(str::to_owned).collect())
}

fn is_tag_value(value: &Bytes) -> bool {
    value.len() <= MAX_TAG_VALUE && std::str::from_utf8(value).is_ok_and(|text| !text.contains(char::is_control))
}
