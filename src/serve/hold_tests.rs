//! How long each request waits, on a paused clock. `imds` says why.

use tokio::time::Instant;

use super::in_memory::InMemoryServer;
use crate::{clock::tests::FIXED_JITTER, exchange::script::Script, intercept::ClientConn, refusal::Reason};

const WORKLOADS: &str = "workloads:
- {pod: reader, serviceAccount: reader, addresses: [10.0.0.1], role: 'arn:aws:iam::111122223333:role/reader-role',
   tokenFile: /reader}
- {pod: idle, serviceAccount: idle, addresses: [10.0.0.2]}
";
const READER: [u8; 4] = [10, 0, 0, 1];
const IDLE: [u8; 4] = [10, 0, 0, 2];
const UNKNOWN: [u8; 4] = [10, 0, 0, 9];
const LIST: &str = "/latest/meta-data/iam/security-credentials/";
const CREDENTIALS: &str = "/latest/meta-data/iam/security-credentials/reader-role";
const NEVER: u64 = 1_000_000;

fn server(script: impl IntoIterator<Item = (u64, Option<Reason>)>) -> InMemoryServer {
    FIXED_JITTER.set(Some(1.0));
    InMemoryServer::new(WORKLOADS, Script::new(script), None)
}

/// Returns the status, and after how many milliseconds it came.
async fn request(server: &InMemoryServer, address: [u8; 4], method: &str, path: &str) -> (u16, u128) {
    let ttl = "x-aws-ec2-metadata-token-ttl-seconds: 60";
    let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{ttl}\r\n\r\n");
    let began = Instant::now();
    let response = server.exchange(request.as_bytes(), ClientConn::from_pod(address.into())).await;
    let status = response.split(' ').nth(1).unwrap_or_else(|| panic!("{response:?}"));
    (status.parse().unwrap(), began.elapsed().as_millis())
}

async fn get(server: &InMemoryServer, path: &str) -> (u16, u128) {
    request(server, READER, "GET", path).await
}

/// IMDS-17, IMDS-18: the wait of the list shortens the wait for the credentials.
#[tokio::test(start_paused = true)]
async fn list_waits_350_ms_and_credentials_until_ready() {
    let server = server([(1_200, None)]);
    assert_eq!(get(&server, LIST).await, (200, 350));
    assert_eq!(get(&server, CREDENTIALS).await, (200, 850));
    assert_eq!(get(&server, LIST).await, (200, 0));
    let metrics = String::from_utf8(server.server.metrics.render().unwrap()).unwrap();
    for line in ["_sum{route=\"credentials\"} 0.85", "_bucket{route=\"role_list\",le=\"0.35\"} 2"] {
        assert!(metrics.contains(&format!("kirsa_request_seconds{line}")), "{line}: {metrics}");
    }
}

/// IMDS-17, IMDS-27
#[tokio::test(start_paused = true)]
async fn hanging_exchange_holds_requests_for_4_s() {
    let server = server([(NEVER, None)]);
    assert_eq!(get(&server, LIST).await, (200, 350));
    for _ in 0..2 {
        assert_eq!(get(&server, CREDENTIALS).await, (503, 4_000));
    }
}

/// IMDS-27: the list does not report a failure that may pass within its wait.
#[tokio::test(start_paused = true)]
async fn transient_failures_are_retried_while_waiting() {
    let throttled = (50, Some(Reason::StsThrottled));
    let once = server([throttled]);
    assert_eq!(get(&once, LIST).await.0, 200);
    let twice = server([throttled, throttled]);
    let (status, took) = get(&twice, CREDENTIALS).await;
    assert!(status == 200 && took < 350, "{status} after {took} ms");
}

/// IMDS-26: the list reports a refusal that arrives within its wait; a later one is first reported by the credentials.
#[tokio::test(start_paused = true)]
async fn refusal_is_reported_as_soon_as_it_is_known() {
    let late = server([(1_200, Some(Reason::AccessDenied))]);
    assert_eq!(get(&late, LIST).await, (200, 350));
    assert_eq!(get(&late, CREDENTIALS).await, (403, 850));
    assert_eq!(get(&late, LIST).await, (403, 0));
    let early = server([(200, Some(Reason::AccessDenied))]);
    assert_eq!(get(&early, LIST).await, (403, 200));
    assert_eq!(get(&early, CREDENTIALS).await, (403, 0));
}

/// IMDS-4
#[tokio::test(start_paused = true)]
async fn imds_token_is_issued_at_once() {
    let server = server([(NEVER, None)]);
    for address in [READER, IDLE, UNKNOWN] {
        assert_eq!(request(&server, address, "PUT", "/latest/api/token").await, (200, 0), "{address:?}");
    }
}

/// IMDS-24, IMDS-25. Another pod's role and a nonexistent one give the same response.
#[tokio::test(start_paused = true)]
async fn no_role_is_404_and_unknown_pod_503() {
    let server = server([(NEVER, None)]);
    for path in [LIST, CREDENTIALS] {
        assert_eq!(request(&server, IDLE, "GET", path).await, (404, 0), "{path}");
        assert_eq!(request(&server, UNKNOWN, "GET", path).await, (503, 800), "{path}");
    }
    for name in ["idle-role", "no-such-role"] {
        assert_eq!(get(&server, &format!("{LIST}{name}")).await, (404, 0), "{name}");
    }
}
