//! The sessions that were issued: what lets the stand-in say later whose credentials it is shown.

use std::collections::HashMap;

use aws_lc_rs::{digest, rand};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use jiff::Timestamp;
use serde::Serialize;

use super::token::Claims;

/// AWS's identifiers are written in the letters and digits of base 32.
const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
/// What every session token of AWS starts with today.
const TOKEN_PREFIX: &str = "IQoJb3JpZ2luX2Vj";

/// One issued session. The keys themselves never leave this module's siblings.
#[derive(Clone, Serialize)]
pub struct Session {
    pub access_key_id: String,
    #[serde(skip)]
    pub(super) secret_access_key: String,
    #[serde(skip)]
    pub(super) session_token: String,
    pub expiration: Timestamp,
    pub role_arn: String,
    /// `arn:aws:sts::<account>:assumed-role/<role>/<session name>`
    pub arn: String,
    pub account: String,
    /// `AROA…:<session name>`
    pub user_id: String,
    /// The token that it was issued for.
    pub claims: Claims,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("access_key_id", &self.access_key_id)
            .field("arn", &self.arn)
            .field("expiration", &self.expiration)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
pub(super) struct Sessions(HashMap<String, Session>);

impl Sessions {
    pub(super) fn keep(&mut self, session: Session) {
        self.0.insert(session.access_key_id.clone(), session);
    }

    pub(super) fn get(&self, access_key_id: &str) -> Option<&Session> {
        self.0.get(access_key_id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Session> {
        self.0.values()
    }

    /// Ends every session now.
    pub(super) fn expire(&mut self, now: Timestamp) {
        self.0.values_mut().for_each(|session| session.expiration = now);
    }
}

pub(super) fn access_key_id() -> String {
    format!("ASIA{}", letters(&random::<16>()))
}

pub(super) fn secret_access_key() -> String {
    BASE64_STANDARD.encode(random::<30>())
}

pub(super) fn session_token() -> String {
    format!("{TOKEN_PREFIX}{}", BASE64_STANDARD.encode(random::<510>()))
}

/// The unique id of a role: the same for the same role, as long as it is not made anew.
pub(super) fn role_id(role_arn: &str) -> String {
    format!("AROA{}", letters(&digest::digest(&digest::SHA256, role_arn.as_bytes()).as_ref()[..17]))
}

pub(super) fn request_id() -> String {
    let hex: String = random::<16>().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-4{}-8{}-{}", &hex[..8], &hex[8..12], &hex[13..16], &hex[17..20], &hex[20..])
}

fn letters(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect()
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).expect("the system has random numbers");
    bytes
}
