//! Bytes on a connection, through hyper's parser and the whole of `serve`, over memory. The same are sent by a pod with a
//! role, by one that is not answered without a session token, and by nobody's address; what comes back is compared with
//! what a second reader of those bytes finds asked.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use hyper_util::server::graceful::GracefulShutdown;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::Runtime,
};

use zeroize::Zeroizing;

use super::{
    framing::{self, Request, Response},
    route::segments,
};
use crate::{
    attribute::{Attributor, file},
    authorise::{Accounts, Authoriser, Defaults, Grant},
    cache::{Budget, Cache},
    clock::UnixTime,
    exchange::{Credential, Issue},
    intercept::{Peer, Service, Share},
    observe::{Metrics, RefusalLog},
    refusal::{Reason, Refusal},
    serve::{
        Server,
        container::{Reviewing, Tokens},
        imdsv2,
        node_metadata::NodeMetadata,
        session_token::{KEY_LENGTH, Sessions},
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

impl Issue for Named {
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
    server: Arc<Server>,
    metrics: Metrics,
}

thread_local! {
    static SITE: Site = Site::new();
}

impl Site {
    fn new() -> Self {
        // What would wait for a client that says nothing more does not.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let metrics = Metrics::new("fuzz").unwrap();
        let (attributor, _) = Attributor::new(metrics.clone());
        let workloads = file::parse(WORKLOADS).unwrap();
        file::apply(&workloads, &attributor);
        let accounts = Accounts::of_file();
        accounts.replace(&workloads, "eks.amazonaws.com/role-arn");
        let given = ("meta-data/placement/region".to_owned(), "eu-central-1".to_owned());
        let server = Server {
            attributor,
            authoriser: Arc::new(Authoriser::new(accounts, Defaults::sample())),
            cache: Arc::new(Cache::new(
                Arc::new(Named),
                Budget::new(1_000, 1_000, metrics.clone()),
                |_| true,
                metrics.clone(),
            )),
            sessions: Sessions::with_key(&[7; KEY_LENGTH]),
            metadata: NodeMetadata::new([given], Vec::new()),
            require_imdsv2: imdsv2::Required {
                everywhere: false,
                namespaces: imdsv2::Namespaces::parse("v2").into_iter().collect(),
            },
            container: Some(Tokens::new(Box::new(review))),
            metrics: metrics.clone(),
            refusals: RefusalLog::default(),
        };
        Self { runtime, server: Arc::new(server), metrics }
    }

    /// A good one, of whoever has the address.
    fn session_token(&self, address: [u8; 4]) -> String {
        let workload = self.server.attributor.peek(&Peer::from_pod(address.into())).ok();
        self.server.sessions.issue(workload.as_ref(), address.into(), 21_600, UnixTime::now())
    }

    /// All that is answered to what a pod sends until it sends no more.
    fn said(&self, sent: &[u8], peer: Peer) -> String {
        let (mut client, stream) = tokio::io::duplex(MAX_INPUT);
        let graceful = GracefulShutdown::new();
        let share = Share::sample(self.metrics.clone());
        let mut answers = Vec::new();
        self.runtime.block_on(async {
            let talk = async {
                // It may have heard enough before all was sent.
                let _ = client.write_all(sent).await;
                let _ = client.shutdown().await;
                client.read_to_end(&mut answers).await.unwrap();
            };
            tokio::join!(self.server.converse(stream, peer, share, graceful.watcher()), talk);
            // Until a refused token is forgotten, or one pod's few tokens would be all that is ever looked at.
            tokio::time::advance(Duration::from_secs(3)).await;
        });
        String::from_utf8(answers).unwrap()
    }
}

pub fn check(data: &[u8]) {
    let data = &data[..data.len().min(MAX_INPUT)];
    SITE.with(|site| {
        for sender in [Sender::Pod("a"), Sender::StrictPod("v"), Sender::Nobody] {
            let own = site.session_token(sender.address());
            let sent = replaced(&replaced(data, OWN, &own), OTHERS, &site.session_token([10, 0, 0, 2]));
            let requests = framing::requests(&sent);
            let said = site.said(&sent, Peer::from_pod(sender.address().into()));
            for (number, response) in framing::responses(&said, &requests).iter().enumerate() {
                metadata(sender, &own, requests.get(number), response);
            }
        }
        let requests = framing::requests(data);
        let said = site.said(data, Peer::from_pod_to([10, 0, 0, 1].into(), Service::Container));
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
