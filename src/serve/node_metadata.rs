//! The node's metadata that pods may read, such as its region: an exact allow-list of paths, and groups of paths with
//! variable names, such as tags ([`groups`]).
//!
//! kirsa polls the node's own metadata service with an IMDS token of its own (`fetch`) and serves what it has fetched.
//! A pod's request never causes a request to the node's service, so no input of a pod can reach it.
//!
//! Requests wait for values that have not been fetched yet, and then get a 503: a 404 is final for SDKs, which would
//! continue without a region.

mod fetch;
pub mod groups;
mod identity_document;
mod source;

#[cfg(test)]
mod fetch_tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bytes::Bytes;
use futures::future::join_all;
use parking_lot::RwLock;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use fetch::{FetchTarget, Schedule};
use groups::{Allowed, STATIC_INTERVAL};
use source::{FetchError, NodeImds, Source};

/// The paths that can be allowed individually; [`groups`] has the others
/// (<https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-instance-metadata.html>). Nothing below `iam/` or
/// `identity-credentials/`, no user data, no keys, and no signatures, which prove the node's identity to others.
pub const ALLOWABLE: [&str; 16] = [
    "dynamic/instance-identity/document",
    "meta-data/ami-id",
    "meta-data/hostname",
    "meta-data/instance-id",
    "meta-data/instance-life-cycle",
    "meta-data/instance-type",
    "meta-data/local-hostname",
    "meta-data/local-ipv4",
    "meta-data/mac",
    "meta-data/placement/availability-zone",
    "meta-data/placement/availability-zone-id",
    "meta-data/placement/region",
    "meta-data/public-hostname",
    "meta-data/public-ipv4",
    "meta-data/services/domain",
    "meta-data/services/partition",
];
/// The default: the region, which SDKs look for in four places, and paths that programs request to detect EC2; a 404
/// tells them that they run elsewhere. None of these grants access or reveals the node's role.
/// - instance-id: `Available()` of AWS SDK for Go v1, which much else is built on
///   (<https://github.com/aws/aws-sdk-go/blob/main/aws/ec2metadata/api.go>): older versions of Terraform's AWS provider
///   (<https://github.com/hashicorp/aws-sdk-go-base/blob/01a9e6edfbff1cef8b8539a657d4434e2d8977f2/awsauth.go>), the EFS
///   CSI driver, which then reads the identity document
///   (<https://github.com/kubernetes-sigs/aws-efs-csi-driver/blob/1d2fdabe37d3f1107a0212ca1acb1d790ed42877/pkg/cloud/metadata.go>);
///   cloud-init without an IMDS token
///   (<https://github.com/canonical/cloud-init/blob/main/cloudinit/sources/DataSourceEc2.py>)
/// - ami-id, then instance-type, hostname, local-hostname: Nomad's fingerprint
///   (<https://github.com/hashicorp/nomad/blob/main/client/fingerprint/env_aws.go>)
/// - instance-id, hostname: OpenTelemetry's resource detection
///   (<https://github.com/open-telemetry/opentelemetry-collector-contrib/blob/main/internal/metadataproviders/aws/ec2/metadata.go>)
pub const DEFAULT: &str = "dynamic/instance-identity/document,meta-data/ami-id,meta-data/hostname,\
                           meta-data/instance-id,meta-data/instance-type,meta-data/local-hostname,\
                           meta-data/placement/availability-zone,meta-data/placement/availability-zone-id,\
                           meta-data/placement/region,meta-data/services/domain,meta-data/services/partition";
/// The path of the identity document, which has the account of the pod's role in place of the node's.
pub const IDENTITY_DOCUMENT: &str = "dynamic/instance-identity/document";

/// Values that were fetched from the node's service or configured.
#[derive(Debug, Default)]
pub struct NodeMetadata {
    /// By path. A path without a value is listed in its folder but not served.
    values: RwLock<BTreeMap<String, Option<Bytes>>>,
    /// Paths of configured values, which override the node's service.
    configured: BTreeSet<String>,
    /// Paths and groups to fetch from the node's service.
    allowed: Allowed,
    /// Allowed paths that have not been fetched yet. A path that ends with a slash stands for everything below it.
    pending: watch::Sender<BTreeSet<String>>,
    document_is_allowed: bool,
}

impl NodeMetadata {
    /// Creates the metadata of a node with configured values, and with what may be fetched.
    pub fn new(configured: impl IntoIterator<Item = (String, String)>, allowed: Allowed) -> Arc<Self> {
        let values: BTreeMap<_, _> = configured.into_iter().map(|(path, value)| (path, Some(value.into()))).collect();
        let configured = values.keys().cloned().collect();
        let document_is_allowed = allowed.paths.iter().any(|path| path == IDENTITY_DOCUMENT);
        let (values, pending) = (RwLock::new(values), watch::Sender::default());
        let metadata = Self { values, configured, allowed, pending, document_is_allowed };
        let paths: Vec<_> = metadata.schedules().iter().flat_map(Schedule::paths).collect();
        let pending = paths.into_iter().filter(|path| !metadata.configured.contains(path)).collect();
        metadata.pending.send_replace(pending);
        Arc::new(metadata)
    }

    fn schedules(&self) -> Vec<Schedule> {
        let single = Schedule::new(FetchTarget::Values(self.allowed.paths.clone()), STATIC_INTERVAL);
        let groups = self.allowed.groups.iter().flat_map(|group| group.schedules());
        [single].into_iter().chain(groups).map(|schedule| schedule.without(&self.configured)).collect()
    }

    /// Waits until a path and everything below it has been fetched, or the node is known to have no metadata service.
    /// Returns false if `until` passes before.
    pub(super) async fn wait_fetched(&self, path: &str, until: Instant) -> bool {
        let fetched = |pending: &BTreeSet<String>| {
            let below = |other: &String| {
                other.strip_prefix(path).is_some_and(|rest| matches!(rest.chars().next(), None | Some('/')))
            };
            let within = |other: &String| other.ends_with('/') && path.starts_with(other);
            !pending.iter().any(|other| below(other) || within(other))
        };
        // The wait cannot fail otherwise: `self` holds the sender.
        timeout_at(until, self.pending.subscribe().wait_for(fetched)).await.is_ok()
    }

    /// Waits for everything that the identity document needs, like [`Self::wait_fetched`].
    pub(super) async fn wait_document_fetched(&self, until: Instant) -> bool {
        self.wait_fetched(IDENTITY_DOCUMENT, until).await
            && (!self.document_is_allowed || self.wait_fetched("meta-data/placement/region", until).await)
    }

    pub(crate) fn value(&self, path: &str) -> Option<Bytes> {
        self.values.read().get(path).cloned().flatten()
    }

    /// Lists the entries directly below a path; folders have a trailing slash.
    pub(crate) fn entries(&self, folder: &str) -> Vec<String> {
        // Call before taking the lock: a second read deadlocks if a writer waits in between.
        let document = self.has_identity_document().then_some(IDENTITY_DOCUMENT);
        let values = self.values.read();
        let paths = document.into_iter().chain(values.keys().map(String::as_str));
        let below =
            paths.filter_map(|path| path.strip_prefix(folder)?.strip_prefix('/').filter(|rest| !rest.is_empty()));
        let mut entries: Vec<String> = below
            .map(|rest| rest.split_once('/').map_or_else(|| rest.to_owned(), |(folder, _)| format!("{folder}/")))
            .collect();
        entries.dedup();
        entries
    }

    /// Polls the node's service for everything that is allowed and not configured, until dropped.
    pub async fn poll(self: Arc<Self>) {
        self.poll_from(&NodeImds::new()).await;
    }

    async fn poll_from(&self, source: &impl Source) {
        join_all(self.schedules().into_iter().map(|schedule| schedule.run(self, source))).await;
    }

    /// Stores the response of the node's service for a path; returns its error. After an error the last value is kept;
    /// a path without one stays pending, since the value may exist.
    fn store(&self, path: &str, response: Result<Option<Bytes>, FetchError>) -> Option<(String, FetchError)> {
        if self.configured.contains(path) {
            return None;
        }
        let (known, error) = match response {
            Ok(value) => {
                let mut values = self.values.write();
                match value {
                    Some(value) => drop(values.insert(path.to_owned(), Some(value))),
                    None => drop(values.remove(path)),
                }
                (true, None)
            }
            Err(FetchError::Failed(error)) => (self.has(path), Some(FetchError::Failed(error))),
            Err(no_service) => (true, Some(no_service)),
        };
        self.pending.send_if_modified(|pending| match known {
            true => pending.remove(path),
            false => pending.insert(path.to_owned()),
        });
        error.map(|error| (path.to_owned(), error))
    }

    /// Stores the listing of a folder, and marks the paths below it that are fetched next as pending. Drops the values
    /// below names that are no longer listed.
    fn store_listing(&self, folder: &str, names: &[String], next: &[String]) {
        let known: BTreeSet<_> = names.iter().map(String::as_str).collect();
        let name =
            |path: &str| Some(path.strip_prefix(folder)?.split_inclusive('/').next().unwrap_or_default().to_owned());
        let mut values = self.values.write();
        values.retain(|path, _| name(path).is_none_or(|name| known.contains(name.as_str())));
        for name in names {
            values.entry(format!("{folder}{name}")).or_default();
        }
        let pending: Vec<_> = next.iter().filter(|path| !matches!(values.get(*path), Some(Some(_)))).cloned().collect();
        drop(values);
        self.pending.send_modify(|all| {
            all.retain(|path| !path.starts_with(folder));
            all.extend(pending);
        });
    }

    /// Returns whether a path has a value, or a folder has entries.
    fn has(&self, path: &str) -> bool {
        let values = self.values.read();
        match path.ends_with('/') {
            true => values.keys().any(|known| known.starts_with(path)),
            false => matches!(values.get(path), Some(Some(_))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn paths(paths: &[&str]) -> Allowed {
        Allowed { paths: paths.iter().map(|path| (*path).to_owned()).collect(), groups: Vec::new() }
    }

    #[test]
    fn secrets_and_signatures_cannot_be_allowed() {
        let schedules = groups::GROUPS.iter().flat_map(|(_, group)| group.schedules());
        let group_paths: Vec<_> = schedules.flat_map(|schedule| schedule.paths()).collect();
        for path in ALLOWABLE.into_iter().chain(group_paths.iter().map(String::as_str)) {
            let forbidden =
                ["/iam", "identity-credentials", "user-data", "public-keys", "signature", "pkcs7", "rsa2048"];
            assert!(!forbidden.iter().any(|part| path.contains(part)), "{path}");
        }
        assert!(DEFAULT.split(',').all(|path| ALLOWABLE.contains(&path)));
        for detection in ["ami-id", "hostname", "instance-id", "instance-type", "local-hostname"] {
            assert!(DEFAULT.split(',').any(|path| path == format!("meta-data/{detection}")), "{detection}");
        }
    }

    #[test]
    fn folders_list_their_entries() {
        let configured = ["meta-data/placement/region", "meta-data/placement/availability-zone", "meta-data/mac"];
        let metadata = NodeMetadata::new(configured.map(|path| (path.to_owned(), "x".to_owned())), Allowed::default());
        assert_eq!(metadata.entries("meta-data"), ["mac", "placement/"]);
        assert_eq!(metadata.entries("meta-data/placement"), ["availability-zone", "region"]);
        assert_eq!(metadata.entries("meta-data/place"), Vec::<String>::new());
    }

    /// A 404 is final for SDKs: values that have not been fetched yet must not give one.
    #[tokio::test(start_paused = true)]
    async fn requests_wait_until_values_are_fetched() {
        let wanted = [IDENTITY_DOCUMENT, "meta-data/placement/region", "meta-data/placement/availability-zone"];
        let metadata = NodeMetadata::new([], paths(&wanted));
        let soon = || Instant::now() + Duration::from_millis(800);
        for path in [wanted[0], wanted[1], "meta-data/placement", "dynamic"] {
            assert!(!metadata.wait_fetched(path, soon()).await, "{path}");
        }
        assert!(!metadata.wait_document_fetched(soon()).await);
        for path in ["meta-data/mac", "meta-data/place", "meta-data/placement/region/x"] {
            assert!(metadata.wait_fetched(path, Instant::now()).await, "{path} is not allowed");
        }
        let request = metadata.wait_fetched(wanted[1], soon());
        tokio::pin!(request);
        assert!(futures::poll!(&mut request).is_pending());
        metadata.pending.send_modify(|pending| assert!(pending.remove(wanted[1])));
        assert!(request.await && !metadata.wait_fetched("meta-data/placement", soon()).await, "the zone is missing");
        metadata.pending.send_modify(BTreeSet::clear);
        assert!(
            metadata.wait_document_fetched(Instant::now()).await
                && metadata.wait_fetched("dynamic", Instant::now()).await
        );
        let configured = NodeMetadata::new([(wanted[1].to_owned(), "x".to_owned())], paths(&wanted[1..2]));
        assert!(configured.wait_fetched(wanted[1], Instant::now()).await, "configured values are not fetched");
    }
}
