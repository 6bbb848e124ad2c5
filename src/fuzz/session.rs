//! IMDSv2 session tokens.

use std::net::IpAddr;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

use crate::{
    attribute::Workload,
    clock::UnixTime,
    serve::session_token::{KEY_LENGTH, Sessions},
};

const NOW: UnixTime = UnixTime(1_700_000_000);
const TTL: u32 = 21_600;

pub fn check(data: &[u8]) {
    let sessions = Sessions::with_key(&[7; KEY_LENGTH]);
    let (pod, source): (_, IpAddr) = (Workload::sample("a", "uid-a", "sa"), [10, 0, 0, 1].into());
    let (other, elsewhere) = (Workload::sample("b", "uid-b", "sa"), [10, 0, 0, 2].into());
    for issued in [sessions.issue(Some(&pod), source, TTL, NOW), sessions.issue(None, source, TTL, NOW)] {
        let raw = URL_SAFE_NO_PAD.decode(&issued).unwrap();
        // As it came, its own bytes in a token's spelling, and each byte of it as a change of a good token.
        let changed: Vec<u8> = raw.iter().zip(data.iter().chain(std::iter::repeat(&0))).map(|(a, b)| a ^ b).collect();
        for token in [data.to_vec(), URL_SAFE_NO_PAD.encode(data).into(), URL_SAFE_NO_PAD.encode(changed).into()] {
            let accepted = |pod, source, at: u64| {
                let session = sessions.read(&token, UnixTime(NOW.0 + at));
                session.is_some_and(|session| sessions.belongs(&session, pod, source))
            };
            let is_it = token == issued.as_bytes();
            let seeds_own = |token: &[u8]| {
                [Some(&pod), None].iter().any(|to| sessions.issue(*to, source, TTL, NOW).as_bytes() == token)
            };
            assert_eq!(accepted(&pod, source, 0), is_it || seeds_own(&token), "{:?}", String::from_utf8_lossy(&token));
            assert!(!accepted(&pod, source, u64::from(TTL) + 1), "expired");
            assert!(!accepted(&other, elsewhere, 0), "another pod's, at another address");
        }
    }
}
