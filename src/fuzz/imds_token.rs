//! IMDS tokens.

use std::net::IpAddr;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

use crate::{
    attribute::Workload,
    clock::UnixTime,
    serve::imds_token::{ImdsTokens, KEY_LENGTH},
};

const NOW: UnixTime = UnixTime(1_700_000_000);
const TTL: u32 = 21_600;

pub fn check(data: &[u8]) {
    let tokens = ImdsTokens::with_key(&[7; KEY_LENGTH]);
    let (pod, source): (_, IpAddr) = (Workload::sample("a", "uid-a", "sa"), [10, 0, 0, 1].into());
    let (other, elsewhere) = (Workload::sample("b", "uid-b", "sa"), [10, 0, 0, 2].into());
    for issued in [tokens.issue(Some(&pod), source, TTL, NOW), tokens.issue(None, source, TTL, NOW)] {
        let raw = URL_SAFE_NO_PAD.decode(&issued).unwrap();
        // The data as a token, the data encoded like a token, and a valid token changed by the data.
        let changed: Vec<u8> = raw.iter().zip(data.iter().chain(std::iter::repeat(&0))).map(|(a, b)| a ^ b).collect();
        for token in [data.to_vec(), URL_SAFE_NO_PAD.encode(data).into(), URL_SAFE_NO_PAD.encode(changed).into()] {
            let accepted = |pod, source, at: u64| {
                let token = tokens.parse(&token, source, UnixTime(NOW.0 + at));
                token.is_some_and(|token| tokens.verify(&token, pod))
            };
            let is_issued = token == issued.as_bytes();
            let is_valid_sample = |token: &[u8]| {
                [Some(&pod), None].iter().any(|to| tokens.issue(*to, source, TTL, NOW).as_bytes() == token)
            };
            assert_eq!(
                accepted(&pod, source, 0),
                is_issued || is_valid_sample(&token),
                "{:?}",
                String::from_utf8_lossy(&token)
            );
            assert!(!accepted(&pod, source, u64::from(TTL) + 1), "expired");
            assert!(!accepted(&other, elsewhere, 0), "another pod at another address");
        }
    }
}
