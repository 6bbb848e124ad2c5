//! Tokens that the API server would never mint, signed with its own key: what remains to refuse them are their claims.

use std::fs;

use anyhow::{Context, Result, anyhow};
use aws_lc_rs::{
    rand::SystemRandom,
    signature::{RSA_PKCS1_SHA256, RsaKeyPair},
};
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD, Engine};
use serde_json::Value;

use super::ApiServer;

impl ApiServer {
    /// A token that it did mint, with other claims.
    pub fn resigned(&self, token: &str, change: impl FnOnce(&mut Value)) -> Result<String> {
        let mut parts = token.split('.');
        let header = parts.next().context("a header")?;
        let mut claims = serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(parts.next().context("claims")?)?)?;
        change(&mut claims);
        let message = format!("{header}.{}", BASE64_URL_SAFE_NO_PAD.encode(claims.to_string()));
        let pem = fs::read_to_string(self.folder.join("sa.key"))?;
        let base64: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
        let key = RsaKeyPair::from_pkcs8(&BASE64_STANDARD.decode(base64)?).map_err(|error| anyhow!("{error}"))?;
        let mut signature = vec![0; key.public_modulus_len()];
        let signed = key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message.as_bytes(), &mut signature);
        signed.map_err(|_| anyhow!("cannot sign a token"))?;
        Ok(format!("{message}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature)))
    }
}
