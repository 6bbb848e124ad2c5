//! Bytes on a connection, through hyper's parser and the whole of `serve`, over memory. The same are sent by a pod with a
//! role, by one that is not answered without a session token, and by nobody's address; what comes back is compared with
//! what a second reader of those bytes finds asked.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

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
        container::{Reviewing, Tokens},
        memory::Memory,
    },
};

const WORKLOADS: &str = "workloads:
- {pod: a, serviceAccount: a, addresses: [10.0.0.1], role: 'arn:aws:iam::111122223333:role/a-role', tokenFile: /a}
- {pod: b, serviceAccount: b, addresses: [10.0.0.2], role: 'arn:aws:iam::111122223333:role/b-role', tokenFile: /b}
- {pod: v, serviceAccount: v, addresses: [10.0.0.3], role: 'arn:aws:iam::111122223333:role/a-role', tokenFile: /v,
   namespace: v2}
";
/// What stands in a sample for a session token: the sender's own, and that of pod `b`.
const OWN: &[u8] = b"TOKEN-OWN";
const OTHERS: &[u8] = b"TOKEN-OTHERS";
/// What there is to be said to a pod that is known and has a role.
const STATUSES: [u16; 8] = [200, 400, 401, 403, 404, 405, 431, 503];
/// Requests that come on one connection are as many as fit into this.
const MAX_INPUT: usize = 64 << 10;

/// Credentials that tell whose they are.
#[derive(Debug)]
struct Named;

impl Issuer for Named {
    fn issue<'a>(&'a self, grant: &'a Grant) -> Pin<Box<dyn Future<Output = Result<Credential, Refusal>> + Send + 'a>> {
        let name = format!("ASIA-OF-{}", grant.workload().pod());
        Box::pin(async move { Ok(Credential::sample(&name, Duration::from_secs(3_600))) })
    }
}

/// Good tokens are `a.a.a` and `b.b.b`, each of its pod.
fn review(token: Zeroizing<String>) -> Reviewing {
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
    memory: Memory,
}

thread_local! {
    static SITE: Site = Site::new();
}

impl Site {
    fn new() -> Self {
        // What would wait for a client that says nothing more does not.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let memory = Memory::new(WORKLOADS, Arc::new(Named), Some(Tokens::new(Box::new(review))));
        Self { runtime, memory }
    }

    fn said(&self, sent: &[u8], peer: ClientConn) -> String {
        self.runtime.block_on(async {
            let said = self.memory.said(sent, peer).await;
            // Until a refused token is forgotten, or one pod's few tokens would be all that is ever looked at.
            tokio::time::advance(Duration::from_secs(3)).await;
            said
        })
    }
}

pub fn check(data: &[u8]) {
    let data = &data[..data.len().min(MAX_INPUT)];
    SITE.with(|site| {
        for sender in [Sender::Pod("a"), Sender::StrictPod("v"), Sender::Nobody] {
            let own = site.memory.session_token(sender.address());
            let sent = replaced(&replaced(data, OWN, &own), OTHERS, &site.memory.session_token([10, 0, 0, 2]));
            let requests = framing::requests(&sent);
            let said = site.said(&sent, ClientConn::from_pod(sender.address().into()));
            for (number, response) in framing::responses(&said, &requests).iter().enumerate() {
                metadata(sender, &own, requests.get(number), response);
            }
        }
        let requests = framing::requests(data);
        let said = site.said(data, ClientConn::from_pod_to([10, 0, 0, 1].into(), MetadataService::Container));
        for (number, response) in framing::responses(&said, &requests).iter().enumerate() {
            container(requests.get(number), response);
        }
    });
}

#[derive(Debug, Clone, Copy)]
enum Sender {
    Pod(&'static str),
    /// That needs a session token.
    StrictPod(&'static str),
    Nobody,
}

impl Sender {
    fn address(self) -> [u8; 4] {
        match self {
            Self::Pod(_) => [10, 0, 0, 1],
            Self::StrictPod(_) => [10, 0, 0, 3],
            Self::Nobody => [10, 0, 0, 9],
        }
    }
}

/// What must hold of an answer, given what was asked at its place.
fn metadata(sender: Sender, own: &str, asked: Option<&Request>, response: &Response) {
    let Response { status, body } = response;
    assert!(STATUSES.contains(status), "{response:?} to {asked:?}");
    let is = |what: &str| body.contains(what);
    assert!(!is("OF-b") && !is("b-role"), "another pod's: {response:?}");
    if *status != 200 {
        assert!(!is("ASIA-") && !is("-role"), "a refusal that tells: {response:?}");
        return;
    }
    let asked = asked.unwrap_or_else(|| panic!("an answer to nothing: {response:?}"));
    let path = segments(&asked.target).unwrap_or_else(|| panic!("{asked:?} was answered {response:?}"));
    let path: Vec<&str> = path.iter().skip(1).map(String::as_str).collect();
    if asked.method == "PUT" {
        let forwarded = asked.first("x-forwarded-for").is_some();
        assert!(path == ["api", "token"] && !forwarded, "{asked:?} was answered {response:?}");
        return;
    }
    assert!(["GET", "HEAD"].contains(&asked.method.as_str()), "{asked:?} was answered {response:?}");
    // Answered without a session token only where none is needed, and with one only if that is the sender's own.
    match asked.first("x-aws-ec2-metadata-token") {
        Some(token) => assert_eq!(token, own.as_bytes(), "with this token {asked:?} was answered {response:?}"),
        None => assert!(!matches!(sender, Sender::StrictPod(_)), "without a token {asked:?} was answered {response:?}"),
    }
    let (pod, of_a_pod) = match sender {
        Sender::Pod(pod) | Sender::StrictPod(pod) => (pod, true),
        Sender::Nobody => ("", false),
    };
    let folders = ["security-credentials", "security-credentials-extended"];
    if is("ASIA-") {
        let asked_for = matches!(path[..], ["meta-data", "iam", folder, "a-role"] if folders.contains(&folder));
        assert!(asked_for && of_a_pod, "{asked:?} was answered {response:?}");
        assert!(is(&format!("\"ASIA-OF-{pod}\"")), "another pod's: {response:?}");
    } else if is("a-role") {
        let asked_for = matches!(path[..], ["meta-data", "iam", what] if what == "info" || folders.contains(&what));
        assert!(asked_for && of_a_pod, "{asked:?} was answered {response:?}");
    } else if is("eu-central-1") {
        assert_eq!(path, ["meta-data", "placement", "region"], "{response:?}");
    }
}

fn container(asked: Option<&Request>, response: &Response) {
    let Response { status, body } = response;
    assert!(STATUSES.contains(status), "{response:?} to {asked:?}");
    assert!(!body.contains("OF-b") && !body.contains("-role"), "another pod's: {response:?}");
    if *status != 200 {
        assert!(!body.contains("ASIA-"), "a refusal that tells: {response:?}");
        return;
    }
    let asked = asked.unwrap_or_else(|| panic!("an answer to nothing: {response:?}"));
    assert!(segments(&asked.target).is_some_and(|path| path == ["v1", "credentials"]), "{asked:?}: {response:?}");
    assert!(["GET", "HEAD"].contains(&asked.method.as_str()), "{asked:?}: {response:?}");
    let tokens: Vec<_> = asked.all("authorization").collect();
    assert_eq!(tokens, [b"a.a.a"], "without its token: {response:?}");
}

fn replaced(data: &[u8], what: &[u8], with: &str) -> Vec<u8> {
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
