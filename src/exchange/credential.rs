//! Credentials of a role session, and the documents that SDKs read. Secrets are redacted in `Debug` and zeroed when the
//! last owner drops them.

use std::fmt;

use bytes::Bytes;
use serde::Serialize;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::json;
use crate::clock::UnixTime;

/// A string that `Debug` redacts and drop zeroes.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    pub fn new(secret: String) -> Self {
        Self(Zeroizing::new(secret))
    }

    /// Returns the plain text, for the code that sends it.
    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// Parts of a [`Credential`], from the response of STS.
#[derive(Debug)]
pub(super) struct CredentialParts<'a> {
    pub access_key_id: String,
    pub secret_access_key: Secret,
    pub session_token: Secret,
    pub account_id: Option<&'a str>,
    /// ISO 8601.
    pub last_updated: String,
    pub expiration: UnixTime,
    pub issued_at: Instant,
    pub expires_at: Instant,
}

/// Temporary credentials of a role. Only this stage constructs them.
pub struct Credential {
    access_key_id: String,
    expiration: UnixTime,
    issued_at: Instant,
    expires_at: Instant,
    document: Bytes,
    extended: Bytes,
    container: Bytes,
}

/// Response to `iam/security-credentials/<role>`. SDKs require every member, as a string:
/// <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-metadata-security-credentials.html>.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Document<'a> {
    code: &'a str,
    last_updated: &'a str,
    #[serde(rename = "Type")]
    kind: &'a str,
    access_key_id: &'a str,
    secret_access_key: &'a str,
    token: &'a str,
    expiration: &'a str,
    /// Present in `security-credentials-extended` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    account_id: Option<&'a str>,
}

/// Response to `/v1/credentials` of container credentials, as the EKS Pod Identity agent writes it:
/// <https://github.com/aws/eks-pod-identity-agent/blob/main/pkg/credentials/model.go>.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ContainerDocument<'a> {
    access_key_id: &'a str,
    secret_access_key: &'a str,
    token: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    account_id: Option<&'a str>,
    expiration: &'a str,
}

impl Credential {
    /// Renders each document once, so that a cached response only clones a reference.
    pub(super) fn new(parts: &CredentialParts<'_>) -> Result<Self, serde_json::Error> {
        let expiration = parts.expiration.iso8601();
        let plain = Document {
            code: "Success",
            last_updated: &parts.last_updated,
            kind: "AWS-HMAC",
            access_key_id: &parts.access_key_id,
            secret_access_key: parts.secret_access_key.expose(),
            token: parts.session_token.expose(),
            expiration: &expiration,
            account_id: None,
        };
        Ok(Self {
            access_key_id: parts.access_key_id.clone(),
            expiration: parts.expiration,
            issued_at: parts.issued_at,
            expires_at: parts.expires_at,
            document: json::ec2(&plain)?,
            container: json::compact(&ContainerDocument {
                access_key_id: plain.access_key_id,
                secret_access_key: plain.secret_access_key,
                token: plain.token,
                account_id: parts.account_id,
                expiration: plain.expiration,
            })?,
            extended: json::ec2(&Document { account_id: parts.account_id, ..plain })?,
        })
    }

    pub fn access_key_id(&self) -> &str {
        &self.access_key_id
    }

    /// Returns the expiration by the wall clock, which SDKs compare with theirs.
    pub fn expiration(&self) -> UnixTime {
        self.expiration
    }

    pub fn issued_at(&self) -> Instant {
        self.issued_at
    }

    pub fn expires_at(&self) -> Instant {
        self.expires_at
    }

    /// Returns the document for `security-credentials/<role>`.
    pub fn document(&self) -> Bytes {
        self.document.clone()
    }

    /// Returns the document with `AccountId`, for `security-credentials-extended/<role>`.
    pub fn extended(&self) -> Bytes {
        self.extended.clone()
    }

    /// Returns the document for `/v1/credentials` of container credentials.
    pub fn container(&self) -> Bytes {
        self.container.clone()
    }

    /// Returns a credential for tests, valid from now for `lifetime`.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn sample(access_key_id: &str, lifetime: std::time::Duration) -> Self {
        Self::sample_dated(access_key_id, lifetime, UnixTime(UnixTime::now().0 + lifetime.as_secs()))
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn sample_dated(access_key_id: &str, lifetime: std::time::Duration, expiration: UnixTime) -> Self {
        Self::new(&CredentialParts {
            access_key_id: access_key_id.into(),
            secret_access_key: Secret::new("secret".into()),
            session_token: Secret::new("token".into()),
            account_id: Some("111122223333"),
            last_updated: "2026-01-01T00:00:00Z".into(),
            expiration,
            issued_at: Instant::now(),
            expires_at: Instant::now() + lifetime,
        })
        .unwrap()
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential")
            .field("access_key_id", &self.access_key_id)
            .field("expiration", &self.expiration.iso8601())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credential(account_id: Option<&str>) -> Credential {
        Credential::new(&CredentialParts {
            access_key_id: "ASIAEXAMPLE".into(),
            secret_access_key: Secret::new("wJalrXUtnFEMI".into()),
            session_token: Secret::new("IQoJb3Jp\"Z2lu".into()),
            account_id,
            last_updated: "2026-01-01T00:00:00Z".into(),
            expiration: UnixTime(1_767_229_200),
            issued_at: Instant::now(),
            expires_at: Instant::now(),
        })
        .unwrap()
    }

    /// IMDS-11, and IMDS-14 for the extended document.
    #[test]
    fn document_has_every_member_that_sdks_need() {
        let golden = concat!(
            "{\n",
            "  \"Code\" : \"Success\",\n",
            "  \"LastUpdated\" : \"2026-01-01T00:00:00Z\",\n",
            "  \"Type\" : \"AWS-HMAC\",\n",
            "  \"AccessKeyId\" : \"ASIAEXAMPLE\",\n",
            "  \"SecretAccessKey\" : \"wJalrXUtnFEMI\",\n",
            "  \"Token\" : \"IQoJb3Jp\\\"Z2lu\",\n",
            "  \"Expiration\" : \"2026-01-01T01:00:00Z\"\n",
            "}",
        );
        let full = credential(Some("111122223333"));
        assert_eq!(full.document(), golden.as_bytes());
        let extended = golden.replace("\n}", ",\n  \"AccountId\" : \"111122223333\"\n}");
        assert_eq!(full.extended(), extended.as_bytes());
        assert_eq!(credential(None).extended(), credential(None).document(), "stores have no accounts");
        assert_eq!(
            &credential(Some("111122223333")).container()[..],
            br#"{"AccessKeyId":"ASIAEXAMPLE","SecretAccessKey":"wJalrXUtnFEMI","Token":"IQoJb3Jp\"Z2lu","AccountId":"111122223333","Expiration":"2026-01-01T01:00:00Z"}"#
        );
    }

    #[test]
    fn debug_redacts_secrets() {
        let text = format!("{:?}", credential(None));
        assert!(text.contains("ASIAEXAMPLE") && !text.contains("wJalr") && !text.contains("IQoJ"), "{text}");
    }
}
