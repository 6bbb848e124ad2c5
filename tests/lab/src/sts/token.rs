//! Web identity tokens: what they claim, and whether that is true.
//!
//! Claims are read before they are verified, so that the call log can name whose token was refused.

use anyhow::Context as _;
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{Jwk, JwkSet},
};
use serde::{Deserialize, Serialize};

use super::role::host_path;

/// A token whose clock runs ahead of this one's by no more than this is not from the future.
const CLOCK_TOLERANCE: i64 = 300;

/// What a token says about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    #[serde(rename = "iss")]
    pub issuer: String,
    #[serde(rename = "sub", default)]
    pub subject: String,
    #[serde(rename = "aud", default, deserialize_with = "one_or_many")]
    pub audience: Vec<String>,
    #[serde(rename = "exp")]
    pub expires: i64,
    #[serde(rename = "nbf", default)]
    pub not_before: Option<i64>,
    #[serde(rename = "iat", default)]
    pub issued: Option<i64>,
    #[serde(rename = "jti", default)]
    pub id: Option<String>,
    #[serde(rename = "kubernetes.io", default)]
    pub kubernetes: Option<Kubernetes>,
}

/// The claim by which Kubernetes says what a token is bound to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kubernetes {
    pub namespace: String,
    #[serde(rename = "serviceaccount", default)]
    pub service_account: Object,
    #[serde(default)]
    pub pod: Option<Object>,
    #[serde(default)]
    pub node: Option<Object>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    pub name: String,
    #[serde(default)]
    pub uid: String,
}

fn one_or_many<'de, D: serde::Deserializer<'de>>(source: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Audience {
        One(String),
        Many(Vec<String>),
    }
    Ok(match Audience::deserialize(source)? {
        Audience::One(one) => vec![one],
        Audience::Many(many) => many,
    })
}

impl Claims {
    /// The claims of a token, unverified.
    pub(super) fn read(token: &str) -> anyhow::Result<Self> {
        let mut parts = token.split('.');
        let (Some(_), Some(payload), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            anyhow::bail!("a token has three parts")
        };
        Ok(serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(payload)?)?)
    }

    /// The values of a trust policy's condition key, none for a key of another provider.
    pub(super) fn condition_values(&self, key: &str) -> Vec<&str> {
        match key.strip_prefix(host_path(&self.issuer)) {
            Some(":sub") => vec![&self.subject],
            Some(":aud") => self.audience.iter().map(String::as_str).collect(),
            _ => Vec::new(),
        }
    }

    pub(super) fn is_from_the_future(&self, now: i64) -> bool {
        let latest = now + CLOCK_TOLERANCE;
        self.not_before.is_some_and(|at| at > latest) || self.issued.is_some_and(|at| at > latest)
    }
}

/// The key that a token names, if the set has it.
pub(super) fn key_of<'a>(token: &str, keys: &'a JwkSet) -> anyhow::Result<Option<&'a Jwk>> {
    let header = jsonwebtoken::decode_header(token)?;
    Ok(match header.kid {
        Some(kid) => keys.find(&kid),
        None => keys.keys.first().filter(|_| keys.keys.len() == 1),
    })
}

/// Whether the token was signed by `key`, by an algorithm that AWS takes.
pub(super) fn is_signed_by(token: &str, key: &Jwk) -> anyhow::Result<bool> {
    let algorithm = jsonwebtoken::decode_header(token)?.alg;
    if !matches!(algorithm, Algorithm::RS256 | Algorithm::ES256) {
        return Ok(false);
    }
    let (message, signature) = token.rsplit_once('.').context("a token has three parts")?;
    let key = DecodingKey::from_jwk(key)?;
    Ok(jsonwebtoken::crypto::verify(signature, message.as_bytes(), &key, algorithm)?)
}
