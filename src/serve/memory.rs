//! A whole server over memory, for what is tested without a network: pods of a workloads file, and whoever is to issue
//! their credentials. In tests and fuzzing builds only.

use std::sync::Arc;

use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    Server,
    container::Tokens,
    imdsv2::{Namespaces, Required},
    node_metadata::{NodeMetadata, groups::Allowed},
    session_token::{KEY_LENGTH, Sessions},
};
use crate::{
    attribute::{Attributor, file},
    authorize::{Accounts, Authorizer, Defaults},
    cache::{Cache, ExchangeLimiter},
    clock::UnixTime,
    connections::ConnectionPermit,
    exchange::Issuer,
    intercept::{ClientConn, SourceQuota},
    observe::{Metrics, RefusalLog},
};

/// Where pods need session tokens.
const STRICT: &str = "v2";
const BUFFER: usize = 64 << 10;

pub(crate) struct Memory {
    pub(crate) server: Server,
    metrics: Metrics,
}

impl Memory {
    pub(crate) fn new(workloads: &str, issuer: Arc<dyn Issuer>, container: Option<Tokens>) -> Self {
        let metrics = Metrics::new("memory").unwrap();
        let (attributor, _) = Attributor::new(metrics.clone());
        let workloads = file::parse(workloads).unwrap();
        file::apply(&workloads, &attributor);
        let accounts = Accounts::for_file();
        accounts.replace(&workloads, "eks.amazonaws.com/role-arn");
        let given = ("meta-data/placement/region".to_owned(), "eu-central-1".to_owned());
        let limiter = ExchangeLimiter::new(1_000, 1_000, metrics.clone());
        let server = Server {
            attributor,
            authorizer: Arc::new(Authorizer::new(accounts, Defaults::sample())),
            cache: Arc::new(Cache::new(issuer, limiter, |_| true, metrics.clone())),
            sessions: Sessions::with_key(&[7; KEY_LENGTH]),
            metadata: NodeMetadata::new([given], Allowed::default()),
            require_imdsv2: Required { everywhere: false, namespaces: Namespaces::parse(STRICT).into_iter().collect() },
            container,
            metrics: metrics.clone(),
            refusals: RefusalLog::default(),
        };
        Self { server, metrics }
    }

    /// A good session token, of whoever has the address.
    pub(crate) fn session_token(&self, address: [u8; 4]) -> String {
        let workload = self.server.attributor.lookup(&ClientConn::from_pod(address.into())).ok();
        self.server.sessions.issue(workload.as_ref(), address.into(), 21_600, UnixTime::now())
    }

    /// All that is answered on one connection to what is sent by a client that then sends no more.
    pub(crate) async fn said(&self, sent: &[u8], peer: ClientConn) -> String {
        self.talk(sent, peer, true).await
    }

    /// The same of a client that waits, and has asked for the connection to be closed.
    #[cfg(test)]
    pub(crate) async fn answered(&self, sent: &[u8], peer: ClientConn) -> String {
        self.talk(sent, peer, false).await
    }

    async fn talk(&self, sent: &[u8], peer: ClientConn, shut: bool) -> String {
        let (mut client, stream) = tokio::io::duplex(BUFFER);
        let graceful = GracefulShutdown::new();
        let share = SourceQuota::sample(self.metrics.clone());
        let mut answers = Vec::new();
        let talk = async {
            // It may have heard enough before all was sent.
            let _ = client.write_all(sent).await;
            if shut {
                let _ = client.shutdown().await;
            }
            client.read_to_end(&mut answers).await.unwrap();
        };
        tokio::join!(self.server.converse(stream, peer, share, ConnectionPermit::sample(), graceful.watcher()), talk);
        String::from_utf8(answers).unwrap()
    }
}
