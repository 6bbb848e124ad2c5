//! What pods may know of the node beside credentials: its region, its zone and the like, by an exact allow-list, and
//! groups of paths whose names are the node's, such as its tags.
//!
//! kirsa reads them from the node's own metadata service by itself, ahead of any request, with a session token of its
//! own, and answers from what it has read. No request of a pod ever causes one to the node's service, so nothing that
//! a pod can write gets there.
//!
//! A value that the node's service has and that was not read yet is waited for, and then "not yet": a 404 is final for
//! SDKs, which would go on without a region.

mod follow;
pub mod groups;
mod source;

#[cfg(test)]
mod follow_tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, PoisonError, RwLock},
};

use bytes::Bytes;
use futures::future::join_all;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::exchange::json;
use follow::{Reads, Schedule};
use groups::{Allowed, STATIC};
use source::{Failure, Imds, Source};

/// Of all that the node's service has, what may be allowed by its path (EC2 User Guide, "Instance metadata categories";
/// [`groups`] has the rest). Never anything below `iam/` or `identity-credentials/`, user data, keys, or signatures, which prove to others who
/// the node is.
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
/// The region, which SDKs look for in four places, and what programs ask to detect EC2; a 404 tells them that they run
/// elsewhere. None of it grants anything, and of the node's role it says nothing.
/// - instance-id: `Available()` of AWS SDK for Go v1, which much else is built on
///   (<https://github.com/aws/aws-sdk-go/blob/main/aws/ec2metadata/api.go>): older versions of Terraform's AWS provider
///   (<https://github.com/hashicorp/aws-sdk-go-base/blob/01a9e6edfbff1cef8b8539a657d4434e2d8977f2/awsauth.go>), the EFS
///   CSI driver, which then reads the identity document
///   (<https://github.com/kubernetes-sigs/aws-efs-csi-driver/blob/1d2fdabe37d3f1107a0212ca1acb1d790ed42877/pkg/cloud/metadata.go>);
///   cloud-init without a session token
///   (<https://github.com/canonical/cloud-init/blob/main/cloudinit/sources/DataSourceEc2.py>)
/// - ami-id, then instance-type, hostname, local-hostname: Nomad's fingerprint
///   (<https://github.com/hashicorp/nomad/blob/main/client/fingerprint/env_aws.go>)
/// - instance-id, hostname: OpenTelemetry's resource detection
///   (<https://github.com/open-telemetry/opentelemetry-collector-contrib/blob/main/internal/metadataproviders/aws/ec2/metadata.go>)
pub const DEFAULT: &str = "dynamic/instance-identity/document,meta-data/ami-id,meta-data/hostname,\
                           meta-data/instance-id,meta-data/instance-type,meta-data/local-hostname,\
                           meta-data/placement/availability-zone,meta-data/placement/availability-zone-id,\
                           meta-data/placement/region,meta-data/services/domain,meta-data/services/partition";
/// Where a pod's account stands in for the node's.
pub const IDENTITY_DOCUMENT: &str = "dynamic/instance-identity/document";
/// Its members in EC2's order, each with the path that says the same and what stands for it where a pod may not read that. All are
/// there always, of the types that EC2 has: Amazonka's parser and others fail where one is missing (EC2 User Guide,
/// "Instance identity documents").
const OF_DOCUMENT: [(&str, Option<&str>, Value); 14] = [
    ("architecture", None, Value::Null),
    ("availabilityZone", Some("meta-data/placement/availability-zone"), EMPTY),
    ("billingProducts", None, Value::Null),
    ("devpayProductCodes", None, Value::Null),
    ("marketplaceProductCodes", None, Value::Null),
    ("imageId", Some("meta-data/ami-id"), EMPTY),
    ("instanceId", Some("meta-data/instance-id"), EMPTY),
    ("instanceType", Some("meta-data/instance-type"), EMPTY),
    ("kernelId", None, Value::Null),
    ("pendingTime", None, Value::Null),
    ("privateIp", Some("meta-data/local-ipv4"), EMPTY),
    ("ramdiskId", None, Value::Null),
    ("region", Some("meta-data/placement/region"), EMPTY),
    ("version", None, Value::Null),
];
const EMPTY: Value = Value::String(String::new());
/// Of the node's own document, what says nothing but what it is allowed for.
const READ: [&str; 4] = ["architecture", "availabilityZone", "region", "version"];
const VERSION: &str = "2017-09-30";

/// What has been read, or was given.
#[derive(Debug, Default)]
pub struct NodeMetadata {
    /// By path. A name without a value is in the listing of its folder and nothing more.
    values: RwLock<BTreeMap<String, Option<Bytes>>>,
    /// Served instead of what the node's own service has.
    given: BTreeSet<String>,
    /// Read from the node's own service where they were not given.
    allowed: Allowed,
    /// Of those, what the node's service may have and has not told yet. A path that ends with a slash stands for
    /// everything below it.
    unread: watch::Sender<BTreeSet<String>>,
    document_is_allowed: bool,
}

impl NodeMetadata {
    /// With values that are given instead of read, and what may be read.
    pub fn new(given: impl IntoIterator<Item = (String, String)>, allowed: Allowed) -> Arc<Self> {
        let values: BTreeMap<_, _> = given.into_iter().map(|(path, value)| (path, Some(value.into()))).collect();
        let given = values.keys().cloned().collect();
        let document_is_allowed = allowed.paths.iter().any(|path| path == IDENTITY_DOCUMENT);
        let (values, unread) = (RwLock::new(values), watch::Sender::default());
        let metadata = Self { values, given, allowed, unread, document_is_allowed };
        let paths: Vec<_> = metadata.schedules().iter().flat_map(Schedule::paths).collect();
        let unread = paths.into_iter().filter(|path| !metadata.given.contains(path)).collect();
        metadata.unread.send_replace(unread);
        Arc::new(metadata)
    }

    fn schedules(&self) -> Vec<Schedule> {
        let single = Schedule::new(Reads::Values(self.allowed.paths.clone()), STATIC);
        let of_groups = self.allowed.groups.iter().flat_map(|group| group.schedules());
        [single].into_iter().chain(of_groups).map(|schedule| schedule.without(&self.given)).collect()
    }

    /// Waits until it is known what there is at a path and below it, or that there is no service to ask; false if it is
    /// not by then.
    pub(super) async fn is_told(&self, path: &str, until: Instant) -> bool {
        let told = |unread: &BTreeSet<String>| {
            let below = |other: &String| {
                other.strip_prefix(path).is_some_and(|rest| matches!(rest.chars().next(), None | Some('/')))
            };
            let within = |other: &String| other.ends_with('/') && path.starts_with(other);
            !unread.iter().any(|other| below(other) || within(other))
        };
        // The sender is held here: waiting cannot fail.
        timeout_at(until, self.unread.subscribe().wait_for(told)).await.is_ok()
    }

    /// The same of what an identity document is made of.
    pub(super) async fn document_is_told(&self, until: Instant) -> bool {
        self.is_told(IDENTITY_DOCUMENT, until).await
            && (!self.document_is_allowed || self.is_told("meta-data/placement/region", until).await)
    }

    pub(crate) fn value(&self, path: &str) -> Option<Bytes> {
        self.values.read().unwrap_or_else(PoisonError::into_inner).get(path).cloned().flatten()
    }

    /// What there is directly below a path: `region` and the like, folders with a slash at the end.
    pub(crate) fn entries(&self, folder: &str) -> Vec<String> {
        // Before the lock is held: reading it twice deadlocks with a writer in between.
        let document = self.has_identity_document().then_some(IDENTITY_DOCUMENT);
        let values = self.values.read().unwrap_or_else(PoisonError::into_inner);
        let paths = document.into_iter().chain(values.keys().map(String::as_str));
        let below =
            paths.filter_map(|path| path.strip_prefix(folder)?.strip_prefix('/').filter(|rest| !rest.is_empty()));
        let mut entries: Vec<String> = below
            .map(|rest| rest.split_once('/').map_or_else(|| rest.to_owned(), |(folder, _)| format!("{folder}/")))
            .collect();
        entries.dedup();
        entries
    }

    /// Whether there is enough known for an identity document.
    pub(super) fn has_identity_document(&self) -> bool {
        let region = || self.value("meta-data/placement/region").is_some();
        self.value(IDENTITY_DOCUMENT).is_some() || (self.document_is_allowed && region())
    }

    /// The identity document with the account of the pod's role in place of the node's, so that a program that takes its
    /// account from there is right about its credentials; with an empty one where the pod has no role. What else it says
    /// of the node it says where that may be read by itself. Where there is none to read, it is made of what was given.
    pub(super) fn identity_document(&self, account: Option<&str>) -> Option<Bytes> {
        let nodes: Map<String, Value> = self
            .value(IDENTITY_DOCUMENT)
            .and_then(|document| serde_json::from_slice(&document).ok())
            .unwrap_or_default();
        let text = |path: &str| Some(Value::String(String::from_utf8(self.value(path)?.to_vec()).ok()?));
        let members = OF_DOCUMENT.into_iter().map(|(member, path, hidden)| {
            let read = || nodes.get(member).filter(|_| READ.contains(&member)).cloned();
            let value = path.and_then(text).or_else(read).unwrap_or(hidden);
            (member, if member == "version" && value.is_null() { VERSION.into() } else { value })
        });
        json::ec2(&Members([("accountId", account.unwrap_or_default().into())].into_iter().chain(members).collect()))
            .ok()
    }

    /// Reads what is allowed and was not given, again and again, until dropped.
    pub async fn follow(self: Arc<Self>) {
        self.follow_from(&Imds::new()).await;
    }

    async fn follow_from(&self, source: &impl Source) {
        join_all(self.schedules().into_iter().map(|schedule| schedule.follow(self, source))).await;
    }

    /// Takes what the node's service answered for a path, and returns a failure. A failure keeps a value that is known;
    /// what is not known may be there.
    fn learn(&self, path: &str, answer: Result<Option<Bytes>, Failure>) -> Option<(String, Failure)> {
        if self.given.contains(path) {
            return None;
        }
        let (known, failure) = match answer {
            Ok(value) => {
                let mut values = self.values.write().unwrap_or_else(PoisonError::into_inner);
                match value {
                    Some(value) => drop(values.insert(path.to_owned(), Some(value))),
                    None => drop(values.remove(path)),
                }
                (true, None)
            }
            Err(Failure::Failed(error)) => (self.has(path), Some(Failure::Failed(error))),
            Err(none) => (true, Some(none)),
        };
        self.unread.send_if_modified(|unread| if known { unread.remove(path) } else { unread.insert(path.to_owned()) });
        failure.map(|failure| (path.to_owned(), failure))
    }

    /// Takes the names that are in a folder now, and the paths below it that are read next. Drops what is below other
    /// names.
    fn learn_folder(&self, folder: &str, names: &[String], next: &[String]) {
        let known: BTreeSet<_> = names.iter().map(String::as_str).collect();
        let name =
            |path: &str| Some(path.strip_prefix(folder)?.split_inclusive('/').next().unwrap_or_default().to_owned());
        let mut values = self.values.write().unwrap_or_else(PoisonError::into_inner);
        values.retain(|path, _| name(path).is_none_or(|name| known.contains(name.as_str())));
        for name in names {
            values.entry(format!("{folder}{name}")).or_default();
        }
        let unread: Vec<_> = next.iter().filter(|path| !matches!(values.get(*path), Some(Some(_)))).cloned().collect();
        drop(values);
        self.unread.send_modify(|known| {
            known.retain(|path| !path.starts_with(folder));
            known.extend(unread);
        });
    }

    /// Whether a value is known, or anything in a folder.
    fn has(&self, path: &str) -> bool {
        let values = self.values.read().unwrap_or_else(PoisonError::into_inner);
        match path.ends_with('/') {
            true => values.keys().any(|known| known.starts_with(path)),
            false => matches!(values.get(path), Some(Some(_))),
        }
    }
}

/// Members in the order given; `Map` would sort them.
struct Members(Vec<(&'static str, Value)>);

impl Serialize for Members {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
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
    fn nothing_that_proves_who_the_node_is_can_be_allowed() {
        let of_groups = groups::GROUPS.iter().flat_map(|(_, group)| group.schedules());
        let of_groups: Vec<_> = of_groups.flat_map(|schedule| schedule.paths()).collect();
        for path in ALLOWABLE.into_iter().chain(of_groups.iter().map(String::as_str)) {
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
    fn folders_list_what_there_is() {
        let given = ["meta-data/placement/region", "meta-data/placement/availability-zone", "meta-data/mac"];
        let metadata = NodeMetadata::new(given.map(|path| (path.to_owned(), "x".to_owned())), Allowed::default());
        assert_eq!(metadata.entries("meta-data"), ["mac", "placement/"]);
        assert_eq!(metadata.entries("meta-data/placement"), ["availability-zone", "region"]);
        assert_eq!(metadata.entries("meta-data/place"), Vec::<String>::new());
    }

    /// A 404 is final for SDKs: what is only not read yet is none.
    #[tokio::test(start_paused = true)]
    async fn what_the_nodes_service_may_have_is_waited_for_until_it_was_read_or_there_is_none() {
        let wanted = [IDENTITY_DOCUMENT, "meta-data/placement/region", "meta-data/placement/availability-zone"];
        let metadata = NodeMetadata::new([], paths(&wanted));
        let soon = || Instant::now() + Duration::from_millis(800);
        for path in [wanted[0], wanted[1], "meta-data/placement", "dynamic"] {
            assert!(!metadata.is_told(path, soon()).await, "{path}");
        }
        assert!(!metadata.document_is_told(soon()).await);
        for path in ["meta-data/mac", "meta-data/place", "meta-data/placement/region/x"] {
            assert!(metadata.is_told(path, Instant::now()).await, "{path} is nothing that is read");
        }
        let asked = metadata.is_told(wanted[1], soon());
        tokio::pin!(asked);
        assert!(futures::poll!(&mut asked).is_pending());
        metadata.unread.send_modify(|unread| assert!(unread.remove(wanted[1])));
        assert!(asked.await && !metadata.is_told("meta-data/placement", soon()).await, "the zone is missing");
        metadata.unread.send_modify(BTreeSet::clear);
        assert!(metadata.document_is_told(Instant::now()).await && metadata.is_told("dynamic", Instant::now()).await);
        let given = NodeMetadata::new([(wanted[1].to_owned(), "x".to_owned())], paths(&wanted[1..2]));
        assert!(given.is_told(wanted[1], Instant::now()).await, "what is given need not be read");
    }

    /// As EC2 has it, but for its white space.
    const NODES: &str = r#"{"accountId":"999999999999","architecture":"x86_64","availabilityZone":"eu-central-1b",
        "billingProducts":["bp-6ba54002"],"devpayProductCodes":null,"marketplaceProductCodes":null,"imageId":"ami-7",
        "instanceId":"i-7","instanceType":"m5.large","kernelId":null,"pendingTime":"2026-01-01T00:00:00Z",
        "privateIp":"10.0.0.7","ramdiskId":null,"region":"eu-central-1","version":"2017-09-30","someday":"new"}"#;

    fn document(values: &[(&str, &str)], account: Option<&str>) -> Value {
        let given = values.iter().map(|(path, value)| ((*path).to_owned(), (*value).to_owned()));
        let metadata = NodeMetadata::new(given, paths(&[IDENTITY_DOCUMENT]));
        serde_json::from_slice(&metadata.identity_document(account).unwrap()).unwrap()
    }

    /// Every member is there, of the type that parsers expect, and says of the node what may be read by itself.
    #[test]
    fn the_identity_document_is_whole_and_names_the_account_of_the_role() {
        let plain = document(&[(IDENTITY_DOCUMENT, NODES)], Some("111122223333"));
        let nodes: Map<String, Value> = serde_json::from_str(NODES).unwrap();
        for (member, value) in nodes.iter().filter(|(member, _)| *member != "someday") {
            let served = &plain[member];
            assert!(served.is_null() || served.is_string(), "{member}: {plain}");
            assert!(!value.is_string() || served.is_string() || member == "pendingTime", "{member}: {plain}");
        }
        assert_eq!(plain.as_object().unwrap().len(), 15, "{plain}");
        assert_eq!((&plain["accountId"], &plain["region"]), (&"111122223333".into(), &"eu-central-1".into()));
        assert_eq!(plain["availabilityZone"], "eu-central-1b");
        for hidden in ["9999", "i-7", "ami-7", "10.0.0.7", "m5.large", "bp-6ba54002", "2026-01"] {
            assert!(!plain.to_string().contains(hidden), "{plain}");
        }
        assert_eq!(document(&[(IDENTITY_DOCUMENT, NODES)], None)["accountId"], "", "of a pod that has no role");
        let more = document(&[(IDENTITY_DOCUMENT, NODES), ("meta-data/instance-id", "i-7")], None);
        assert_eq!((&more["instanceId"], &more["privateIp"]), (&"i-7".into(), &"".into()));
    }

    #[test]
    fn identity_document_has_ec2s_bytes() {
        let given = [(IDENTITY_DOCUMENT, NODES), ("meta-data/instance-id", "i-7")];
        let given = given.map(|(path, value)| (path.to_owned(), value.to_owned()));
        let metadata = NodeMetadata::new(given, paths(&[IDENTITY_DOCUMENT]));
        let golden = concat!(
            "{\n",
            "  \"accountId\" : \"111122223333\",\n",
            "  \"architecture\" : \"x86_64\",\n",
            "  \"availabilityZone\" : \"eu-central-1b\",\n",
            "  \"billingProducts\" : null,\n",
            "  \"devpayProductCodes\" : null,\n",
            "  \"marketplaceProductCodes\" : null,\n",
            "  \"imageId\" : \"\",\n",
            "  \"instanceId\" : \"i-7\",\n",
            "  \"instanceType\" : \"\",\n",
            "  \"kernelId\" : null,\n",
            "  \"pendingTime\" : null,\n",
            "  \"privateIp\" : \"\",\n",
            "  \"ramdiskId\" : null,\n",
            "  \"region\" : \"eu-central-1\",\n",
            "  \"version\" : \"2017-09-30\"\n",
            "}",
        );
        assert_eq!(metadata.identity_document(Some("111122223333")).unwrap(), golden.as_bytes());
    }

    /// On nodes that have no metadata service of their own.
    #[test]
    fn where_no_identity_document_can_be_read_it_is_made_of_the_values_that_are_given() {
        let given = [("meta-data/placement/region", "mars-1"), ("meta-data/instance-type", "rover")];
        let made = document(&given, Some("111122223333"));
        assert_eq!((&made["region"], &made["instanceType"]), (&"mars-1".into(), &"rover".into()));
        assert_eq!((made["accountId"].as_str(), made["version"].as_str()), (Some("111122223333"), Some(VERSION)));
        let given = given.map(|(path, value)| (path.to_owned(), value.to_owned()));
        assert!(!NodeMetadata::new(given.clone(), Allowed::default()).has_identity_document(), "not allowed");
        let metadata = NodeMetadata::new(given, paths(&[IDENTITY_DOCUMENT]));
        assert_eq!(metadata.entries("dynamic/instance-identity"), ["document"]);
        assert!(!NodeMetadata::new([], paths(&[IDENTITY_DOCUMENT])).has_identity_document(), "of nothing");
    }
}
