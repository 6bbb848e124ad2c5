//! What SDKs do when they need credentials, and how often: as measured of those that real pods use.

use std::time::Duration;

/// Routes, as the report names them.
pub(super) const TOKEN: &str = "token";
pub(super) const LIST: &str = "list";
pub(super) const CREDENTIALS: &str = "credentials";
pub(super) const REGION: &str = "region";

#[derive(Clone, Copy, Debug)]
pub(super) struct Pattern {
    /// In this order, on one connection.
    pub(super) requests: &'static [&'static str],
    pub(super) every: Duration,
    /// Of a hundred pods.
    share: u32,
}

const V2: &[&str] = &[TOKEN, LIST, CREDENTIALS];
const V1: &[&str] = &[LIST, CREDENTIALS];

const fn pattern(requests: &'static [&'static str], seconds: u64, share: u32) -> Pattern {
    Pattern { requests, every: Duration::from_secs(seconds), share }
}

/// .NET; Vault; C++ and some of Java v2; Java v1; Go v2; botocore, which caches; PHP and rusoto, which do not and ask
/// with every call of AWS.
const PATTERNS: [Pattern; 7] = [
    pattern(&[TOKEN, LIST, CREDENTIALS, REGION], 120, 15),
    pattern(V2, 60, 15),
    pattern(V2, 300, 20),
    pattern(V1, 900, 10),
    pattern(V2, 1_200, 20),
    pattern(V2, 600, 10),
    pattern(V2, 1, 10),
];

/// That of the pod with this number.
pub(super) fn of(pod: usize) -> Pattern {
    let mut left = (pod % 100) as u32;
    for pattern in PATTERNS {
        match left.checked_sub(pattern.share) {
            None => return pattern,
            Some(rest) => left = rest,
        }
    }
    PATTERNS[1]
}
