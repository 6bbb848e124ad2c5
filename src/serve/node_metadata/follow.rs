//! Reads what is allowed from the node's service, again and again. Each schedule has an interval and a back-off of its
//! own, so that nothing waits for what fails or takes long elsewhere.

use std::{collections::BTreeSet, time::Duration};

use anyhow::anyhow;
use bytes::Bytes;
use futures::{StreamExt, future, stream};
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::{
    NodeMetadata,
    groups::{DEVICES, INTERFACES, MAC, OF_INTERFACE, STATIC, TAGS, is_device, is_mac, is_tag_key},
    source::{Failure, Source},
};
use crate::clock::Backoff;

const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(300);
/// Intervals that a retry waits at most: a notice is of no use when it is late.
const LAST_RETRY_INTERVALS: u32 = 5;
/// Requests of one schedule that are open at once.
const AT_ONCE: usize = 4;
/// EC2 has fewer of each: 50 tags besides AWS's own, and no instance type with more interfaces or volumes.
const MAX_NAMES: usize = 128;
/// A value of 256 characters, in UTF-8.
const MAX_TAG: usize = 1_024;

/// What one schedule reads.
#[derive(Debug)]
pub(super) enum Reads {
    Values(Vec<String>),
    /// The MAC addresses of all interfaces, and what is served of the primary one.
    Interfaces,
    /// The names of the block devices.
    Devices,
    Tags,
}

#[derive(Debug)]
pub(super) struct Schedule {
    reads: Reads,
    every: Duration,
    retry: Backoff,
}

type Failures = Vec<(String, Failure)>;

impl Schedule {
    pub(super) fn new(reads: Reads, every: Duration) -> Self {
        let retry = Backoff::new(FIRST_RETRY, LAST_RETRY.min(every * LAST_RETRY_INTERVALS));
        Self { reads, every, retry }
    }

    /// What it will have read when it has succeeded once; folders have a slash at their end.
    pub(super) fn paths(&self) -> Vec<String> {
        match &self.reads {
            Reads::Values(paths) => paths.clone(),
            Reads::Interfaces => vec![MAC.to_owned(), INTERFACES.to_owned()],
            Reads::Devices => vec![DEVICES.to_owned()],
            Reads::Tags => vec![TAGS.to_owned()],
        }
    }

    pub(super) fn without(mut self, given: &BTreeSet<String>) -> Self {
        if let Reads::Values(paths) = &mut self.reads {
            paths.retain(|path| !given.contains(path));
        }
        self
    }

    /// Never returns, unless there is nothing to read.
    pub(super) async fn follow(mut self, metadata: &NodeMetadata, source: &impl Source) {
        let mut due = self.paths();
        let mut failing = None;
        while !due.is_empty() {
            let failures = match &self.reads {
                Reads::Values(_) => values(metadata, source, &due, |_| true).await,
                Reads::Interfaces => interfaces(metadata, source).await,
                Reads::Devices => devices(metadata, source).await,
                Reads::Tags => tags(metadata, source).await,
            };
            if failures.is_empty() {
                if failing != Some(false) {
                    self.report();
                }
                failing = Some(false);
                self.retry.reset();
                due = self.paths();
                sleep(self.every).await;
            } else {
                report_failures(&failures, failing == Some(true));
                failing = Some(true);
                due = failures.into_iter().map(|(path, _)| path).collect();
                sleep(self.retry.pause()).await;
            }
        }
    }

    fn report(&self) {
        let paths = self.paths();
        if self.every == STATIC {
            info!(of = paths.len(), "node metadata read");
        } else {
            debug!(?paths, every = ?self.every, "group of node metadata read");
        }
    }
}

/// Warns at the first failure of several in a row.
fn report_failures(failures: &Failures, again: bool) {
    for (path, failure) in failures {
        match failure {
            // Usual outside EC2: give values by --node-metadata-value there.
            Failure::NoService(_) => debug!(path, error = %failure, "the node's own metadata service does not answer"),
            Failure::Failed(_) if again => debug!(path, error = %failure, "node metadata could not be read again"),
            Failure::Failed(_) => warn!(path, error = %failure, "node metadata could not be read: trying again"),
        }
    }
}

/// What is not as it should be counts as not there.
async fn values(metadata: &NodeMetadata, source: &impl Source, paths: &[String], good: fn(&Bytes) -> bool) -> Failures {
    let reads = paths.iter().cloned().map(|path| async move {
        let answer = source.get(&path).await.map(|value| value.filter(good));
        metadata.learn(&path, answer)
    });
    stream::iter(reads).buffer_unordered(AT_ONCE).filter_map(future::ready).collect().await
}

async fn interfaces(metadata: &NodeMetadata, source: &impl Source) -> Failures {
    let read = source.get(MAC).await.and_then(|mac| match mac.as_deref().map(std::str::from_utf8) {
        Some(Ok(text)) if !is_mac(text) => Err(Failure::Failed(anyhow!("not a MAC address"))),
        Some(Err(_)) => Err(Failure::Failed(anyhow!("not a MAC address"))),
        _ => Ok(mac),
    });
    let failed = metadata.learn(MAC, read);
    // Without it, it is not known which paths there will be.
    if let Some(failed) = failed {
        metadata.learn(INTERFACES, Err(failed.1.again()));
        return vec![failed];
    }
    let listed = match names(source, INTERFACES, |name| is_mac(name.trim_end_matches('/'))).await {
        Ok(listed) => listed,
        Err(failure) => return metadata.learn(INTERFACES, Err(failure)).into_iter().collect(),
    };
    let listed: Vec<_> = listed.iter().map(|mac| format!("{}/", mac.trim_end_matches('/'))).collect();
    let primary = metadata.value(MAC).and_then(|mac| Some(format!("{}/", std::str::from_utf8(&mac).ok()?)));
    let primary = primary.filter(|mac| listed.contains(mac));
    let paths: Vec<_> = primary
        .iter()
        .flat_map(|mac| OF_INTERFACE.iter().map(move |name| format!("{INTERFACES}{mac}{name}")))
        .collect();
    metadata.learn_folder(INTERFACES, &listed, &paths);
    values(metadata, source, &paths, |_| true).await
}

async fn devices(metadata: &NodeMetadata, source: &impl Source) -> Failures {
    match names(source, DEVICES, is_device).await {
        Ok(names) => metadata.learn_folder(DEVICES, &names, &[]),
        Err(failure) => return metadata.learn(DEVICES, Err(failure)).into_iter().collect(),
    }
    Vec::new()
}

async fn tags(metadata: &NodeMetadata, source: &impl Source) -> Failures {
    let keys = match names(source, TAGS, is_tag_key).await {
        Ok(keys) => keys,
        Err(failure) => return metadata.learn(TAGS, Err(failure)).into_iter().collect(),
    };
    let paths: Vec<_> = keys.iter().map(|key| format!("{TAGS}{key}")).collect();
    metadata.learn_folder(TAGS, &keys, &paths);
    values(metadata, source, &paths, is_tag_value).await
}

/// The lines of a listing that pass a check; none where the node has no such folder.
async fn names(source: &impl Source, folder: &str, good: impl Fn(&str) -> bool) -> Result<Vec<String>, Failure> {
    let listing = source.get(folder).await?.unwrap_or_default();
    let listing = std::str::from_utf8(&listing).map_err(|error| Failure::Failed(error.into()))?;
    let (good, wrong): (Vec<_>, Vec<_>) = listing.lines().partition(|name| good(name));
    let left_out = wrong.len() + good.len().saturating_sub(MAX_NAMES);
    if left_out > 0 {
        debug!(folder, left_out, "names in the node's metadata are left out: not as EC2 has them, or too many");
    }
    Ok(good.into_iter().take(MAX_NAMES).map(str::to_owned).collect())
}

fn is_tag_value(value: &Bytes) -> bool {
    value.len() <= MAX_TAG && std::str::from_utf8(value).is_ok_and(|text| !text.contains(char::is_control))
}
