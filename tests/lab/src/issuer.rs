//! An issuer of service account tokens for runs without Kubernetes, with the good ones and the bad ones.
//!
//! Its tokens look like those of an API server, so that what verifies them cannot tell the difference.

use anyhow::{Context as _, anyhow};
use aws_lc_rs::{
    digest,
    rand::SystemRandom,
    rsa::KeySize,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, RSA_PKCS1_SHA256, RsaKeyPair},
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jiff::Timestamp;
use jsonwebtoken::jwk::JwkSet;
use serde_json::{Value, json};

/// The audience that AWS expects.
pub const AUDIENCE: &str = "sts.amazonaws.com";

/// A key pair and the issuer's URL that goes into its tokens.
#[derive(Debug)]
pub struct Issuer {
    url: String,
    key: Key,
    key_id: String,
}

#[derive(Debug)]
enum Key {
    Rs256(RsaKeyPair),
    Es256(EcdsaKeyPair),
}

impl Issuer {
    /// With an RSA key, which is what most API servers sign with.
    pub fn new(url: &str) -> anyhow::Result<Self> {
        let key = RsaKeyPair::generate(KeySize::Rsa2048).map_err(|_| anyhow!("cannot make an RSA key"))?;
        Ok(Self::with_key(url, Key::Rs256(key)))
    }

    /// With a P-256 key.
    pub fn with_elliptic_curve(url: &str) -> anyhow::Result<Self> {
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING);
        Ok(Self::with_key(url, Key::Es256(key.map_err(|_| anyhow!("cannot make a P-256 key"))?)))
    }

    fn with_key(url: &str, key: Key) -> Self {
        let public = match &key {
            Key::Rs256(pair) => pair.public_key().as_ref(),
            Key::Es256(pair) => pair.public_key().as_ref(),
        };
        let key_id = encode(digest::digest(&digest::SHA256, public));
        Self { url: url.to_owned(), key, key_id }
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// The public half, for whoever verifies.
    pub fn jwks(&self) -> anyhow::Result<JwkSet> {
        let mut key = match &self.key {
            Key::Rs256(pair) => {
                let public = pair.public_key();
                json!({
                    "kty": "RSA",
                    "alg": "RS256",
                    "n": encode(public.modulus().big_endian_without_leading_zero()),
                    "e": encode(public.exponent().big_endian_without_leading_zero()),
                })
            }
            Key::Es256(pair) => {
                // An uncompressed point: one byte that says so, then both coordinates.
                let (x, y) = pair.public_key().as_ref().get(1..).context("no point")?.split_at(32);
                json!({ "kty": "EC", "alg": "ES256", "crv": "P-256", "x": encode(x), "y": encode(y) })
            }
        };
        key["use"] = "sig".into();
        key["kid"] = self.key_id.as_str().into();
        Ok(serde_json::from_value(json!({ "keys": [key] }))?)
    }

    /// A token that begins now and ends in `ttl` seconds, in the past when that is negative. What is in
    /// `extra` is added to the claims, or takes their place; null takes a claim away.
    pub fn mint(&self, subject: &str, audience: &str, ttl: i64, extra: Value) -> anyhow::Result<String> {
        let now = Timestamp::now().as_second();
        let begin = now.min(now + ttl - 1);
        let mut claims = json!({
            "iss": self.url,
            "sub": subject,
            "aud": [audience],
            "iat": begin,
            "nbf": begin,
            "exp": now + ttl,
        });
        for (name, value) in extra.as_object().into_iter().flatten() {
            claims[name] = value.clone();
        }
        if let Some(claims) = claims.as_object_mut() {
            claims.retain(|_, value| !value.is_null());
        }
        let algorithm = match self.key {
            Key::Rs256(_) => "RS256",
            Key::Es256(_) => "ES256",
        };
        let header = json!({ "alg": algorithm, "kid": self.key_id });
        let message = format!("{}.{}", encode(header.to_string()), encode(claims.to_string()));
        let signature = self.sign(message.as_bytes())?;
        Ok(format!("{message}.{}", encode(signature)))
    }

    fn sign(&self, message: &[u8]) -> anyhow::Result<Vec<u8>> {
        let random = SystemRandom::new();
        let signed = match &self.key {
            Key::Rs256(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature).map(|()| signature)
            }
            Key::Es256(pair) => pair.sign(&random, message).map(|signature| signature.as_ref().to_vec()),
        };
        signed.map_err(|_| anyhow!("cannot sign a token"))
    }

    /// What an API server mints for a pod: ten minutes, for AWS, bound to the pod.
    pub fn pod_token(&self, namespace: &str, service_account: &str, pod: &str, uid: &str) -> anyhow::Result<String> {
        let bound = json!({
            "jti": format!("{pod}-{}", Timestamp::now().as_nanosecond()),
            "kubernetes.io": {
                "namespace": namespace,
                "serviceaccount": { "name": service_account, "uid": format!("{service_account}-uid") },
                "pod": { "name": pod, "uid": uid },
            },
        });
        self.mint(&subject(namespace, service_account), AUDIENCE, 600, bound)
    }

    pub fn expired(&self, subject: &str) -> anyhow::Result<String> {
        self.mint(subject, AUDIENCE, -60, Value::Null)
    }

    pub fn for_another_audience(&self, subject: &str) -> anyhow::Result<String> {
        self.mint(subject, "vault", 600, Value::Null)
    }

    /// A good token whose subject was changed after it was signed.
    pub fn tampered(&self, subject: &str) -> anyhow::Result<String> {
        let (honest, forged) = (
            self.mint("system:serviceaccount:default:nobody", AUDIENCE, 600, Value::Null)?,
            self.mint(subject, AUDIENCE, 600, Value::Null)?,
        );
        let (message, signature) = (forged.rsplit_once('.'), honest.rsplit_once('.'));
        let (Some((message, _)), Some((_, signature))) = (message, signature) else {
            return Err(anyhow!("a token has three parts"));
        };
        Ok(format!("{message}.{signature}"))
    }
}

/// The subject of a service account's tokens.
pub fn subject(namespace: &str, service_account: &str) -> String {
    format!("system:serviceaccount:{namespace}:{service_account}")
}

fn encode(bytes: impl AsRef<[u8]>) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}
