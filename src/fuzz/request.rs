//! Bytes on a connection, through hyper's parser and the whole of `serve`, over memory: two pods with a role each, of
//! which the first one sends.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use hyper_util::server::graceful::GracefulShutdown;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::Runtime,
};

use zeroize::Zeroizing;

use crate::{
    attribute::{Attributor, file},
    authorise::{Accounts, Authoriser, Defaults, Grant},
    cache::{Budget, Cache},
    exchange::{Credential, Issue},
    intercept::{Peer, Service, Share},
    observe::{Metrics, RefusalLog},
    refusal::{Reason, Refusal},
    serve::{
        Server,
        container::{Reviewing, Tokens},
        imdsv2,
        session::{KEY_LENGTH, Sessions},
        upstream::NodeMetadata,
    },
};

const WORKLOADS: &str = "workloads:
- {pod: a, serviceAccount: a, addresses: [10.0.0.1], role: 'arn:aws:iam::111122223333:role/a-role', tokenFile: /a}
- {pod: b, serviceAccount: b, addresses: [10.0.0.2], role: 'arn:aws:iam::111122223333:role/b-role', tokenFile: /b}
";
/// What there is to be said to a pod that is known and has a role.
const STATUSES: [&str; 9] = ["100", "200", "400", "401", "403", "404", "405", "431", "503"];
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
            metadata: NodeMetadata::new([given]),
            require_imdsv2: imdsv2::Required::default(),
            container: Some(Tokens::new(Box::new(review))),
            metrics: metrics.clone(),
            refusals: RefusalLog::default(),
        };
        Self { runtime, server: Arc::new(server), metrics }
    }

    /// All that is answered to what a pod sends until it sends no more.
    fn answers(&self, sent: &[u8], peer: Peer) -> Vec<u8> {
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
        answers
    }
}

pub fn check(data: &[u8]) {
    let sent = &data[..data.len().min(MAX_INPUT)];
    SITE.with(|site| {
        let said = String::from_utf8(site.answers(sent, Peer::from_pod([10, 0, 0, 1].into()))).unwrap();
        well_formed(&said, sent);
        assert!(!said.contains("OF-b") && !said.contains("b-role"), "another pod's: {said}");
        if said.contains("ASIA-") {
            assert!(asks_for_credentials(sent), "credentials nobody asked for: {said}");
        }
        let peer = Peer::from_pod_to([10, 0, 0, 1].into(), Service::Container);
        let said = String::from_utf8(site.answers(sent, peer)).unwrap();
        well_formed(&said, sent);
        assert!(!said.contains("OF-b") && !said.contains("-role"), "another pod's: {said}");
        let with_token = sent.windows(5).any(|window| window == b"a.a.a");
        assert!(with_token || !said.contains(" 200 "), "without its token: {said}");
    });
}

/// Whole answers, no more of them than requests there can be, each with a status that is meant.
fn well_formed(said: &str, sent: &[u8]) {
    let lines = sent.iter().filter(|byte| **byte == b'\n').count();
    let answers: Vec<&str> = said.split("HTTP/1.").skip(1).collect();
    assert!(said.is_empty() || said.starts_with("HTTP/1."), "{said}");
    assert!(answers.len() <= 2 * lines + 1, "{} answers to {lines} lines", answers.len());
    for answer in answers {
        let status = answer.split(' ').nth(1).unwrap_or_default();
        assert!(STATUSES.contains(&status), "{status}: {said}");
        assert!(answer.contains("\r\n\r\n"), "cut short: {said}");
    }
}

/// Whether a request for one's own credentials stands in there, in whatever spelling.
fn asks_for_credentials(sent: &[u8]) -> bool {
    let mut decoded = Vec::new();
    let mut rest = sent;
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        match (first, digits.and_then(|digits| u8::from_str_radix(digits, 16).ok())) {
            (b'%', Some(byte)) => {
                decoded.push(byte);
                rest = &tail[2..];
            }
            _ => decoded.push(*first),
        }
    }
    let has = |word: &[u8]| decoded.windows(word.len()).any(|window| window == word);
    has(b"security-credentials") && has(b"a-role")
}
