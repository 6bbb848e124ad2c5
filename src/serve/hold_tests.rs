//! How long which request is held, on a paused clock: what the numbers are for stands in `imds`.

use tokio::time::Instant;

use super::memory::Memory;
use crate::{clock::tests::FIXED_JITTER, exchange::script::Script, intercept::ClientConn, refusal::Reason};

const WORKLOADS: &str = "workloads:
- {pod: reader, serviceAccount: reader, addresses: [10.0.0.1], role: 'arn:aws:iam::111122223333:role/reader-role',
   tokenFile: /reader}
- {pod: idle, serviceAccount: idle, addresses: [10.0.0.2]}
";
const READER: [u8; 4] = [10, 0, 0, 1];
const IDLE: [u8; 4] = [10, 0, 0, 2];
const STRANGER: [u8; 4] = [10, 0, 0, 9];
const LIST: &str = "/latest/meta-data/iam/security-credentials/";
const CREDENTIALS: &str = "/latest/meta-data/iam/security-credentials/reader-role";
const NEVER: u64 = 1_000_000;

fn memory(script: impl IntoIterator<Item = (u64, Option<Reason>)>) -> Memory {
    FIXED_JITTER.set(Some(1.0));
    Memory::new(WORKLOADS, Script::new(script), None)
}

/// The status, and after how many milliseconds.
async fn ask(memory: &Memory, address: [u8; 4], method: &str, path: &str) -> (u16, u128) {
    let ttl = "x-aws-ec2-metadata-token-ttl-seconds: 60";
    let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{ttl}\r\n\r\n");
    let began = Instant::now();
    let answer = memory.answered(request.as_bytes(), ClientConn::from_pod(address.into())).await;
    let status = answer.split(' ').nth(1).unwrap_or_else(|| panic!("{answer:?}"));
    (status.parse().unwrap(), began.elapsed().as_millis())
}

async fn get(memory: &Memory, path: &str) -> (u16, u128) {
    ask(memory, READER, "GET", path).await
}

/// IMDS-17, IMDS-18: what the list waited, the credentials need not.
#[tokio::test(start_paused = true)]
async fn the_list_is_held_for_350_ms_and_the_credentials_until_they_come() {
    let memory = memory([(1_200, None)]);
    assert_eq!(get(&memory, LIST).await, (200, 350));
    assert_eq!(get(&memory, CREDENTIALS).await, (200, 850));
    assert_eq!(get(&memory, LIST).await, (200, 0));
    let metrics = String::from_utf8(memory.server.metrics.render().unwrap()).unwrap();
    for line in ["_sum{route=\"credentials\"} 0.85", "_bucket{route=\"role_list\",le=\"0.35\"} 2"] {
        assert!(metrics.contains(&format!("kirsa_request_seconds{line}")), "{line}: {metrics}");
    }
}

/// IMDS-17, IMDS-27
#[tokio::test(start_paused = true)]
async fn an_exchange_that_never_ends_holds_nobody_longer_than_4_s() {
    let memory = memory([(NEVER, None)]);
    assert_eq!(get(&memory, LIST).await, (200, 350));
    for _ in 0..2 {
        assert_eq!(get(&memory, CREDENTIALS).await, (503, 4_000));
    }
}

/// IMDS-27: a failure that the list may outwait is none that it knows of.
#[tokio::test(start_paused = true)]
async fn failures_that_pass_are_tried_again_within_the_hold() {
    let throttled = (50, Some(Reason::StsThrottled));
    let once = memory([throttled]);
    assert_eq!(get(&once, LIST).await.0, 200);
    let twice = memory([throttled, throttled]);
    let (status, took) = get(&twice, CREDENTIALS).await;
    assert!(status == 200 && took < 350, "{status} after {took} ms");
}

/// IMDS-26: only a failure that arrives between the list and the credentials is first told at the credentials.
#[tokio::test(start_paused = true)]
async fn a_refusal_is_told_as_soon_as_it_is_there() {
    let late = memory([(1_200, Some(Reason::AccessDenied))]);
    assert_eq!(get(&late, LIST).await, (200, 350));
    assert_eq!(get(&late, CREDENTIALS).await, (403, 850));
    assert_eq!(get(&late, LIST).await, (403, 0));
    let early = memory([(200, Some(Reason::AccessDenied))]);
    assert_eq!(get(&early, LIST).await, (403, 200));
    assert_eq!(get(&early, CREDENTIALS).await, (403, 0));
}

/// IMDS-4: a session token waits for nobody, whatever is wrong.
#[tokio::test(start_paused = true)]
async fn a_session_token_is_there_at_once() {
    let memory = memory([(NEVER, None)]);
    for address in [READER, IDLE, STRANGER] {
        assert_eq!(ask(&memory, address, "PUT", "/latest/api/token").await, (200, 0), "{address:?}");
    }
}

/// IMDS-24, IMDS-25. Another role's name and one that does not exist are told apart by nothing.
#[tokio::test(start_paused = true)]
async fn whoever_gets_nothing_is_told_at_once_and_a_stranger_after_800_ms() {
    let memory = memory([(NEVER, None)]);
    for path in [LIST, CREDENTIALS] {
        assert_eq!(ask(&memory, IDLE, "GET", path).await, (404, 0), "{path}");
        assert_eq!(ask(&memory, STRANGER, "GET", path).await, (503, 800), "{path}");
    }
    for name in ["idle-role", "no-such-role"] {
        assert_eq!(get(&memory, &format!("{LIST}{name}")).await, (404, 0), "{name}");
    }
}
