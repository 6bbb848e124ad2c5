//! What an instance's metadata says, document by document.

use jiff::{SignedDuration, Timestamp};
use serde_json::json;

/// The role whose credentials no pod may ever see, and their key, to look for in answers and logs.
pub const NODE_ROLE: &str = "node-role";
pub const NODE_ACCESS_KEY_ID: &str = "ASIANODENODENODENODE";

/// What the instance is, as far as its metadata tells.
#[derive(Debug, Clone)]
pub struct Instance {
    pub account: String,
    pub region: String,
    pub availability_zone: String,
    pub availability_zone_id: String,
    pub image_id: String,
    pub instance_id: String,
    pub instance_type: String,
    pub private_ip: String,
    /// The instance profile's role, if there is one.
    pub role: Option<String>,
    /// What that role is worth.
    pub credentials: Credentials,
    /// Answers 401 to requests without a session token, as `HttpTokens: required` makes EC2 do.
    pub requires_token: bool,
}

impl Default for Instance {
    fn default() -> Self {
        Self {
            account: "444455556666".to_owned(),
            region: "eu-central-1".to_owned(),
            availability_zone: "eu-central-1b".to_owned(),
            availability_zone_id: "euc1-az3".to_owned(),
            image_id: "ami-0123456789abcdef0".to_owned(),
            instance_id: "i-0123456789abcdef0".to_owned(),
            instance_type: "m7g.large".to_owned(),
            private_ip: "10.0.0.10".to_owned(),
            role: Some(NODE_ROLE.to_owned()),
            credentials: Credentials::default(),
            requires_token: false,
        }
    }
}

#[derive(Debug, Clone)]
pub struct Credentials {
    pub access_key_id: String,
    pub secret_access_key: String,
    pub session_token: String,
}

impl Default for Credentials {
    /// No STS knows them.
    fn default() -> Self {
        Self {
            access_key_id: NODE_ACCESS_KEY_ID.to_owned(),
            secret_access_key: "the-secret-of-the-node-the-secret-of-the".to_owned(),
            session_token: "the-session-token-of-the-node".to_owned(),
        }
    }
}

impl Instance {
    /// A folder answers with its entries, with a slash at its end or without.
    pub(super) fn document(&self, path: &str) -> Option<String> {
        let path = path.strip_prefix("/latest")?.trim_end_matches('/');
        if let Some(path) = path.strip_prefix("/meta-data/iam") {
            return self.iam(path, self.role.as_deref()?);
        }
        let text = match path {
            "" => "dynamic\nmeta-data\nuser-data",
            "/meta-data" => {
                "ami-id\nhostname\niam/\ninstance-id\ninstance-type\nlocal-hostname\nlocal-ipv4\nplacement/\nservices/"
            }
            "/meta-data/ami-id" => &self.image_id,
            "/meta-data/hostname" | "/meta-data/local-hostname" => {
                return Some(format!("ip-{}.ec2.internal", self.private_ip.replace('.', "-")));
            }
            "/meta-data/instance-id" => &self.instance_id,
            "/meta-data/instance-type" => &self.instance_type,
            "/meta-data/local-ipv4" => &self.private_ip,
            "/meta-data/placement" => "availability-zone\navailability-zone-id\nregion",
            "/meta-data/placement/availability-zone" => &self.availability_zone,
            "/meta-data/placement/availability-zone-id" => &self.availability_zone_id,
            "/meta-data/placement/region" => &self.region,
            "/meta-data/services" => "domain\npartition",
            "/meta-data/services/domain" => "amazonaws.com",
            "/meta-data/services/partition" => "aws",
            "/dynamic" => "instance-identity/",
            "/dynamic/instance-identity" => "document\npkcs7\nsignature",
            "/dynamic/instance-identity/document" => return Some(format!("{:#}", self.identity())),
            "/dynamic/instance-identity/signature" | "/dynamic/instance-identity/pkcs7" => {
                "c2lnbmF0dXJlIG9mIHRoZSBub2Rl"
            }
            "/user-data" => "#!/bin/sh\n# the node's join secret",
            _ => return None,
        };
        Some(text.to_owned())
    }

    fn iam(&self, path: &str, role: &str) -> Option<String> {
        let Self { account, credentials, .. } = self;
        let now = Timestamp::from_second(Timestamp::now().as_second()).ok()?;
        let document = match path {
            "" => return Some("info\nsecurity-credentials/".to_owned()),
            "/security-credentials" => return Some(role.to_owned()),
            "/info" => json!({
                "Code": "Success",
                "LastUpdated": now.to_string(),
                "InstanceProfileArn": format!("arn:aws:iam::{account}:instance-profile/{role}"),
                "InstanceProfileId": "AIPANODENODENODENODEN",
            }),
            _ if path.strip_prefix("/security-credentials/") == Some(role) => json!({
                "Code": "Success",
                "LastUpdated": now.to_string(),
                "Type": "AWS-HMAC",
                "AccessKeyId": credentials.access_key_id,
                "SecretAccessKey": credentials.secret_access_key,
                "Token": credentials.session_token,
                "Expiration": (now + SignedDuration::from_hours(6)).to_string(),
            }),
            _ => return None,
        };
        Some(format!("{document:#}"))
    }

    fn identity(&self) -> serde_json::Value {
        json!({
            "accountId": self.account,
            "architecture": "arm64",
            "availabilityZone": self.availability_zone,
            "imageId": self.image_id,
            "instanceId": self.instance_id,
            "instanceType": self.instance_type,
            "pendingTime": "2026-11-01T00:00:00Z",
            "privateIp": self.private_ip,
            "region": self.region,
            "version": "2017-09-30",
        })
    }
}
