//! Bytes on a connection, through hyper's parser and all of `serve`, over an in-memory stream. Each sample is sent by a
//! pod with a role, by a pod that requires an IMDS token, and from an unknown address; the responses are compared with
//! the requests that a second parser finds.

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;
use tokio::runtime::Runtime;
use zeroize::Zeroizing;

use super::{
    framing::{self, Request, Response},
    route::segments,
};
use crate::{
    authorize::Grant,
    exchange::{Credential, Issuer},
    intercept::{ClientConn, MetadataService},
    refusal::{Reason, Refusal},
    serve::{
        container::{Review, TokenReviews},
        in_memory::InMemoryServer,
    },
};

const WORKLOADS: &str = "workloads:
- {pod: a, serviceAccount: a, addresses: [10.0.0.1], role: 'arn:aws:iam::111122223333:role/a-role', tokenFile: /a}
- {pod: b, serviceAccount: b, addresses: [10.0.0.2], role: 'arn:aws:iam::111122223333:role/b-role', tokenFile: /b}
- {pod: v, serviceAccount: v, addresses: [10.0.0.3], role: 'arn:aws:iam::111122223333:role/a-role', tokenFile: /v,
   namespace: v2}
";
/// Placeholders in samples for IMDS tokens: the sender's own, and one of pod `b`.
const OWN: &[u8] = b"TOKEN-OWN";
const OTHERS: &[u8] = b"TOKEN-OTHERS";
/// The statuses that a pod may see.
const STATUSES: [u16; 8] = [200, 400, 401, 403, 404, 405, 431, 503];
/// Longer samples are cut off here.
const MAX_INPUT: usize = 64 << 10;

/// Issues credentials that contain the name of their pod.
#[derive(Debug)]
struct PodNameIssuer;

impl Issuer for PodNameIssuer {
    fn issue<'a>(&'a self, grant: &'a Grant) -> BoxFuture<'a, Result<Credential, Refusal>> {
        let name = format!("ASIA-OF-{}", grant.workload().pod());
        Box::pin(async move { Ok(Credential::sample(&name, Duration::from_secs(3_600))) })
    }
}

/// Accepts `a.a.a` and `b.b.b`, each for its pod.
fn review(token: Zeroizing<String>) -> Review {
    Box::pin(async move {
        match token.as_str() {
            "a.a.a" => Ok("default/a".into()),
            "b.b.b" => Ok("default/b".into()),
            _ => Err(Reason::ContainerTokenRefused.into()),
        }
    })
}

struct Site {
    runtime: Runtime,
    server: InMemoryServer,
}

thread_local! {
    static SITE: Site = Site::new();
}

impl Site {
    fn new() -> Self {
        // Paused: timeouts cost no real time.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let server = InMemoryServer::new(WORKLOADS, Arc::new(PodNameIssuer), Some(TokenReviews::new(Box::new(review))));
        Self { runtime, server }
    }

    fn exchange(&self, sent: &[u8], peer: ClientConn) -> String {
        self.runtime.block_on(async {
            let received = self.server.exchange_and_half_close(sent, peer).await;
            // Let rejected container tokens expire: otherwise the limit per pod would hide all later ones.
            tokio::time::advance(Duration::from_secs(3)).await;
            received
        })
    }
}

pub fn check(data: &[u8]) {
    let data = &data[..data.len().min(MAX_INPUT)];
    SITE.with(|site| {
        for sender in [Sender::Pod("a"), Sender::StrictPod("v"), Sender::Unknown] {
            let own = site.server.imds_token(sender.address());
            let sent = replace(&replace(data, OWN, &own), OTHERS, &site.server.imds_token([10, 0, 0, 2]));
            let requests = framing::requests(&sent);
            let received = site.exchange(&sent, ClientConn::from_pod(sender.address().into()));
            for (number, response) in framing::responses(&received, &requests).iter().enumerate() {
                check_metadata(sender, &own, requests.get(number), response);
            }
        }
        let requests = framing::requests(data);
        let received = site.exchange(data, ClientConn::from_pod_to([10, 0, 0, 1].into(), MetadataService::Container));
        for (number, response) in framing::responses(&received, &requests).iter().enumerate() {
            check_container(requests.get(number), response);
        }
    });
}

#[derive(Debug, Clone, Copy)]
enum Sender {
    Pod(&'static str),
    /// A pod that requires an IMDS token.
    StrictPod(&'static str),
    Unknown,
}

impl Sender {
    fn address(self) -> [u8; 4] {
        match self {
            Self::Pod(_) => [10, 0, 0, 1],
            Self::StrictPod(_) => [10, 0, 0, 3],
            Self::Unknown => [10, 0, 0, 9],
        }
    }
}

/// Checks a response of the metadata service against the request at its position.
fn check_metadata(sender: Sender, own: &str, request: Option<&Request>, response: &Response) {
    let Response { status, body } = response;
    assert!(STATUSES.contains(status), "{response:?} to {request:?}");
    let has = |text: &str| body.contains(text);
    assert!(!has("OF-b") && !has("b-role"), "credentials of another pod: {response:?}");
    if *status != 200 {
        assert!(!has("ASIA-") && !has("-role"), "a refusal with secrets: {response:?}");
        return;
    }
    let request = request.unwrap_or_else(|| panic!("a response without a request: {response:?}"));
    let path = segments(&request.target).unwrap_or_else(|| panic!("{request:?} got {response:?}"));
    let path: Vec<&str> = path.iter().skip(1).map(String::as_str).collect();
    if request.method == "PUT" {
        let forwarded = request.first("x-forwarded-for").is_some();
        assert!(path == ["api", "token"] && !forwarded, "{request:?} got {response:?}");
        return;
    }
    assert!(["GET", "HEAD"].contains(&request.method.as_str()), "{request:?} got {response:?}");
    // Requests without a token succeed only if none is required, those with a token only if it is the sender's own.
    match request.first("x-aws-ec2-metadata-token") {
        Some(token) => assert_eq!(token, own.as_bytes(), "with this token {request:?} got {response:?}"),
        None => {
            assert!(!matches!(sender, Sender::StrictPod(_)), "without a token {request:?} got {response:?}")
        }
    }
    let (pod, is_known) = match sender {
        Sender::Pod(pod) | Sender::StrictPod(pod) => (pod, true),
        Sender::Unknown => ("", false),
    };
    let folders = ["security-credentials", "security-credentials-extended"];
    if has("ASIA-") {
        let requested = matches!(path[..], ["meta-data", "iam", folder, "a-role"] if folders.contains(&folder));
        assert!(requested && is_known, "{request:?} got {response:?}");
        assert!(has(&format!("\"ASIA-OF-{pod}\"")), "credentials of another pod: {response:?}");
    } else if has("a-role") {
        let requested = matches!(path[..], ["meta-data", "iam", what] if what == "info" || folders.contains(&what));
        assert!(requested && is_known, "{request:?} got {response:?}");
    } else if has("eu-central-1") {
        assert_eq!(path, ["meta-data", "placement", "region"], "{response:?}");
    }
}

/// Checks a response of the container credentials service against the request at its position.
fn check_container(request: Option<&Request>, response: &Response) {
    let Response { status, body } = response;
    assert!(STATUSES.contains(status), "{response:?} to {request:?}");
    assert!(!body.contains("OF-b") && !body.contains("-role"), "credentials of another pod: {response:?}");
    if *status != 200 {
        assert!(!body.contains("ASIA-"), "a refusal with secrets: {response:?}");
        return;
    }
    let request = request.unwrap_or_else(|| panic!("a response without a request: {response:?}"));
    assert!(segments(&request.target).is_some_and(|path| path == ["v1", "credentials"]), "{request:?}: {response:?}");
    assert!(["GET", "HEAD"].contains(&request.method.as_str()), "{request:?}: {response:?}");
    let tokens: Vec<_> = request.all("authorization").collect();
    assert_eq!(tokens, [b"a.a.a"], "not its token: {response:?}");
}

fn replace(data: &[u8], what: &[u8], with: &str) -> Vec<u8> {
    let mut whole = Vec::with_capacity(data.len());
    let mut rest = data;
    while let Some(at) = rest.windows(what.len()).position(|window| window == what) {
        whole.extend_from_slice(&rest[..at]);
        whole.extend_from_slice(with.as_bytes());
        rest = &rest[at + what.len()..];
    }
    whole.extend_from_slice(rest);
    whole
}
