//! The identity document (<https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-identity-documents.html>).

use bytes::Bytes;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use super::{IDENTITY_DOCUMENT, NodeMetadata};
use crate::exchange::json;

/// The members in EC2's order, each with the metadata path of the same value and the placeholder for a value that pods
/// may not read. All members are always present with EC2's types: Amazonka's parser and others fail if one is missing.
const MEMBERS: [(&str, Option<&str>, Value); 14] = [
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
/// Members that are copied from the node's own document. They describe its location and platform only.
const COPIED: [&str; 4] = ["architecture", "availabilityZone", "region", "version"];
const VERSION: &str = "2017-09-30";

impl NodeMetadata {
    /// Returns whether there are enough values for an identity document.
    pub(in crate::serve) fn has_identity_document(&self) -> bool {
        let region = || self.value("meta-data/placement/region").is_some();
        self.value(IDENTITY_DOCUMENT).is_some() || (self.document_is_allowed && region())
    }

    /// Returns the identity document with the account of the pod's role in place of the node's, so that it matches the
    /// pod's credentials; the account is empty if the pod has no role. Other members have the node's values if pods may
    /// read the path of the same value. Without a document of the node, it is built from the configured values.
    pub(in crate::serve) fn identity_document(&self, account: Option<&str>) -> Option<Bytes> {
        let nodes: Map<String, Value> = self
            .value(IDENTITY_DOCUMENT)
            .and_then(|document| serde_json::from_slice(&document).ok())
            .unwrap_or_default();
        let text = |path: &str| Some(Value::String(String::from_utf8(self.value(path)?.to_vec()).ok()?));
        let members = MEMBERS.into_iter().map(|(member, path, placeholder)| {
            let copied = || nodes.get(member).filter(|_| COPIED.contains(&member)).cloned();
            let value = path.and_then(text).or_else(copied).unwrap_or(placeholder);
            (member, if member == "version" && value.is_null() { VERSION.into() } else { value })
        });
        json::ec2(&OrderedMembers(
            [("accountId", account.unwrap_or_default().into())].into_iter().chain(members).collect(),
        ))
        .ok()
    }
}

/// Serializes members in this order; `Map` would sort them.
struct OrderedMembers(Vec<(&'static str, Value)>);

impl Serialize for OrderedMembers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::groups::Allowed, *};

    fn document_only() -> Allowed {
        Allowed { paths: vec![IDENTITY_DOCUMENT.to_owned()], groups: Vec::new() }
    }

    /// EC2's document, except for its white space.
    const NODE_DOCUMENT: &str = r#"{"accountId":"999999999999","architecture":"x86_64",
        "availabilityZone":"eu-central-1b",
        "billingProducts":["bp-6ba54002"],"devpayProductCodes":null,"marketplaceProductCodes":null,"imageId":"ami-7",
        "instanceId":"i-7","instanceType":"m5.large","kernelId":null,"pendingTime":"2026-01-01T00:00:00Z",
        "privateIp":"10.0.0.7","ramdiskId":null,"region":"eu-central-1","version":"2017-09-30","someday":"new"}"#;

    fn document(configured: &[(&str, &str)], account: Option<&str>) -> Value {
        let configured = configured.iter().map(|(path, value)| ((*path).to_owned(), (*value).to_owned()));
        let metadata = NodeMetadata::new(configured, document_only());
        serde_json::from_slice(&metadata.identity_document(account).unwrap()).unwrap()
    }

    /// Every member is present with the type that parsers expect, and reveals only what pods may read.
    #[test]
    fn document_is_complete_with_the_roles_account() {
        let plain = document(&[(IDENTITY_DOCUMENT, NODE_DOCUMENT)], Some("111122223333"));
        let nodes: Map<String, Value> = serde_json::from_str(NODE_DOCUMENT).unwrap();
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
        assert_eq!(document(&[(IDENTITY_DOCUMENT, NODE_DOCUMENT)], None)["accountId"], "", "for a pod without a role");
        let more = document(&[(IDENTITY_DOCUMENT, NODE_DOCUMENT), ("meta-data/instance-id", "i-7")], None);
        assert_eq!((&more["instanceId"], &more["privateIp"]), (&"i-7".into(), &"".into()));
    }

    #[test]
    fn identity_document_has_ec2s_bytes() {
        let configured = [(IDENTITY_DOCUMENT, NODE_DOCUMENT), ("meta-data/instance-id", "i-7")];
        let configured = configured.map(|(path, value)| (path.to_owned(), value.to_owned()));
        let metadata = NodeMetadata::new(configured, document_only());
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

    /// For nodes without a metadata service of their own.
    #[test]
    fn document_can_be_built_from_configured_values() {
        let configured = [("meta-data/placement/region", "mars-1"), ("meta-data/instance-type", "rover")];
        let built = document(&configured, Some("111122223333"));
        assert_eq!((&built["region"], &built["instanceType"]), (&"mars-1".into(), &"rover".into()));
        assert_eq!((built["accountId"].as_str(), built["version"].as_str()), (Some("111122223333"), Some(VERSION)));
        let configured = configured.map(|(path, value)| (path.to_owned(), value.to_owned()));
        assert!(!NodeMetadata::new(configured.clone(), Allowed::default()).has_identity_document(), "not allowed");
        let metadata = NodeMetadata::new(configured, document_only());
        assert_eq!(metadata.entries("dynamic/instance-identity"), ["document"]);
        assert!(!NodeMetadata::new([], document_only()).has_identity_document(), "no values");
    }
}
