//! What pods may know of the node beside credentials: its region, its zone and the like, by an exact allow-list.
//!
//! kirsa reads them from the node's own metadata service by itself, ahead of any request, with a session token of its
//! own, and answers from what it has read. No request of a pod ever causes one to the node's service, so nothing that
//! a pod can write gets there.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde_json::{Map, Value};
use tokio::time::{sleep, timeout};
use tracing::{debug, info};

use super::{TOKEN, TOKEN_TTL};
use crate::intercept::METADATA_V4;

/// Of all that the node's service has, what may be allowed at all (EC2 User Guide, "Instance metadata categories").
/// Never anything below `iam/` or `identity-credentials/`, user data, keys, or signatures, which prove to others who
/// the node is.
pub const ALLOWABLE: [&str; 14] = [
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
    "meta-data/services/domain",
    "meta-data/services/partition",
];
/// What SDKs look for: the region, in four places.
pub const DEFAULT: &str = "dynamic/instance-identity/document,meta-data/placement/availability-zone,\
                           meta-data/placement/availability-zone-id,meta-data/placement/region,\
                           meta-data/services/domain,meta-data/services/partition";
/// Where a pod's account stands in for the node's.
pub const IDENTITY_DOCUMENT: &str = "dynamic/instance-identity/document";
/// What the identity document is allowed for, and what in it says no more than another path: a pod reads that in the
/// one place if it may in the other (EC2 User Guide, "Instance identity documents").
const OF_DOCUMENT: [&str; 5] = ["accountId", "architecture", "availabilityZone", "region", "version"];
const OF_PATHS: [(&str, &str); 4] = [
    ("imageId", "meta-data/ami-id"),
    ("instanceId", "meta-data/instance-id"),
    ("instanceType", "meta-data/instance-type"),
    ("privateIp", "meta-data/local-ipv4"),
];

/// None of it changes while the node runs, but for a resize.
const REFRESH: Duration = Duration::from_secs(3_600);
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));
const CALL: Duration = Duration::from_secs(2);
const MAX_VALUE: usize = 16 << 10;

/// What has been read, or was given.
#[derive(Debug, Default)]
pub struct NodeMetadata {
    values: RwLock<BTreeMap<String, Bytes>>,
}

impl NodeMetadata {
    /// With values that are given instead of read.
    pub fn new(given: impl IntoIterator<Item = (String, String)>) -> Arc<Self> {
        let values = given.into_iter().map(|(path, value)| (path, value.into())).collect();
        Arc::new(Self { values: RwLock::new(values) })
    }

    pub(crate) fn value(&self, path: &str) -> Option<Bytes> {
        self.values.read().unwrap_or_else(PoisonError::into_inner).get(path).cloned()
    }

    /// What there is directly below a path: `region` and the like, folders with a slash at the end.
    pub(crate) fn entries(&self, folder: &str) -> Vec<String> {
        let values = self.values.read().unwrap_or_else(PoisonError::into_inner);
        let below = values.keys().filter_map(|path| path.strip_prefix(folder)?.strip_prefix('/'));
        let mut entries: Vec<String> = below
            .map(|rest| rest.split_once('/').map_or_else(|| rest.to_owned(), |(folder, _)| format!("{folder}/")))
            .collect();
        entries.dedup();
        entries
    }

    /// The identity document with the account of the pod's role in place of the node's, so that a program that takes its
    /// account from there is right about its credentials; without any where the pod has no role. What else it says of
    /// the node it says where that may be read by itself.
    pub(super) fn identity_document(&self, account: Option<&str>) -> Option<Bytes> {
        let mut document: Map<String, Value> = serde_json::from_slice(&self.value(IDENTITY_DOCUMENT)?).ok()?;
        let allowed = |member: &str| OF_PATHS.iter().any(|(of, path)| *of == member && self.value(path).is_some());
        document.retain(|member, _| OF_DOCUMENT.contains(&member.as_str()) || allowed(member));
        match account {
            Some(account) => document.insert("accountId".into(), account.into()),
            None => document.remove("accountId"),
        };
        serde_json::to_vec_pretty(&document).ok().map(Bytes::from)
    }

    /// Reads what is allowed and was not given, again and again, until dropped.
    pub async fn follow(self: Arc<Self>, allowed: Vec<String>) {
        let given: Vec<String> = self.values.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect();
        let wanted: Vec<String> = allowed.into_iter().filter(|path| !given.contains(path)).collect();
        let mut pause = RETRY.0;
        while !wanted.is_empty() {
            match self.read(&wanted).await {
                Ok(read) => {
                    info!(read, of = wanted.len(), "node metadata read");
                    pause = RETRY.0;
                    sleep(REFRESH).await;
                }
                Err(error) => {
                    // Usual outside EC2: give values by --node-metadata-value there.
                    debug!(error = format!("{error:#}"), "the node's own metadata service does not answer");
                    sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
                    pause = (pause * 2).min(RETRY.1);
                }
            }
        }
    }

    async fn read(&self, wanted: &[String]) -> anyhow::Result<usize> {
        let token = call(Method::PUT, "api/token", (TOKEN_TTL, "60")).await?.unwrap_or_default();
        let token = std::str::from_utf8(&token)?.to_owned();
        let mut read = 0;
        for path in wanted {
            if let Some(value) = call(Method::GET, path, (TOKEN.as_str(), &token)).await? {
                self.values.write().unwrap_or_else(PoisonError::into_inner).insert(path.clone(), value);
                read += 1;
            }
        }
        Ok(read)
    }
}

/// One request of our own to the node's service; `None` for what it does not have.
async fn call(method: Method, path: &str, header: (&str, &str)) -> anyhow::Result<Option<Bytes>> {
    let request = Request::builder()
        .method(method)
        .uri(format!("http://{METADATA_V4}/latest/{path}"))
        .header(header.0, header.1)
        .body(Empty::<Bytes>::new())?;
    let answer = async {
        let response = Client::builder(TokioExecutor::new()).build_http().request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_VALUE).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!("{error}"))?.to_bytes();
        match status {
            StatusCode::OK => Ok(Some(body)),
            StatusCode::NOT_FOUND => Ok(None),
            other => Err(anyhow::anyhow!("{other}")),
        }
    };
    timeout(CALL, answer).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_proves_who_the_node_is_can_be_allowed() {
        for path in ALLOWABLE {
            let forbidden =
                ["/iam", "identity-credentials", "user-data", "public-keys", "signature", "pkcs7", "rsa2048"];
            assert!(!forbidden.iter().any(|part| path.contains(part)), "{path}");
        }
        assert!(DEFAULT.split(',').all(|path| ALLOWABLE.contains(&path)));
    }

    #[test]
    fn folders_list_what_there_is() {
        let given = ["meta-data/placement/region", "meta-data/placement/availability-zone", "meta-data/mac"];
        let metadata = NodeMetadata::new(given.map(|path| (path.to_owned(), "x".to_owned())));
        assert_eq!(metadata.entries("meta-data"), ["mac", "placement/"]);
        assert_eq!(metadata.entries("meta-data/placement"), ["availability-zone", "region"]);
        assert_eq!(metadata.entries("meta-data/place"), Vec::<String>::new());
    }

    #[test]
    fn the_identity_document_names_the_account_of_the_role() {
        let metadata = |more: &[(&str, &str)]| {
            let node = r#"{"accountId":"999999999999","region":"eu-central-1","instanceId":"i-7","privateIp":"10.0.0.7",
                "kernelId":null}"#;
            NodeMetadata::new(
                [(IDENTITY_DOCUMENT, node)].iter().chain(more).map(|(a, b)| (a.to_string(), b.to_string())),
            )
        };
        let text = |account, more: &[(&str, &str)]| {
            String::from_utf8(metadata(more).identity_document(account).unwrap().to_vec()).unwrap()
        };
        let with = text(Some("111122223333"), &[]);
        assert!(with.contains("111122223333") && !with.contains("9999"), "{with}");
        assert!(!text(None, &[]).contains("accountId") && text(None, &[]).contains("eu-central-1"));
        for hidden in ["i-7", "10.0.0.7", "kernelId"] {
            assert!(!with.contains(hidden), "{with}");
        }
        let more = text(None, &[("meta-data/instance-id", "i-7")]);
        assert!(more.contains("i-7") && !more.contains("10.0.0.7"), "what may be read by itself: {more}");
    }
}
