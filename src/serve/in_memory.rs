//! A server over in-memory streams, for tests without a network: its pods come from a workloads file, their credentials
//! from a given issuer. In tests and fuzzing builds only.

use std::sync::Arc;

use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    Server,
    container::TokenReviews,
    imds_token::{ImdsTokens, KEY_LENGTH},
    imdsv2::{NamespacePattern, RequireImdsV2},
    node_metadata::{NodeMetadata, groups::Allowed},
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

/// The namespace that requires IMDSv2.
const IMDSV2_NAMESPACE: &str = "v2";
const BUFFER: usize = 64 << 10;

pub(crate) struct InMemoryServer {
    pub(crate) server: Server,
    metrics: Metrics,
}

impl InMemoryServer {
    pub(crate) fn new(workloads: &str, issuer: Arc<dyn Issuer>, container: Option<TokenReviews>) -> Self {
        let metrics = Metrics::new("in-memory").unwrap();
        let (attributor, _) = Attributor::new(metrics.clone());
        let workloads = file::parse(workloads).unwrap();
        file::apply(&workloads, &attributor);
        let accounts = Accounts::for_file();
        accounts.replace(&workloads, "eks.amazonaws.com/role-arn");
        let region = ("meta-data/placement/region".to_owned(), "eu-central-1".to_owned());
        let limiter = ExchangeLimiter::new(1_000, 1_000, metrics.clone());
        let server = Server {
            attributor,
            authorizer: Arc::new(Authorizer::new(accounts, Defaults::sample())),
            cache: Arc::new(Cache::new(issuer, limiter, |_| true, metrics.clone())),
            imds_tokens: ImdsTokens::with_key(&[7; KEY_LENGTH]),
            metadata: NodeMetadata::new([region], Allowed::default()),
            require_imdsv2: RequireImdsV2 {
                everywhere: false,
                namespaces: NamespacePattern::parse(IMDSV2_NAMESPACE).into_iter().collect(),
            },
            container,
            metrics: metrics.clone(),
            refusals: RefusalLog::default(),
        };
        Self { server, metrics }
    }

    /// Issues a valid IMDS token to the address.
    pub(crate) fn imds_token(&self, address: [u8; 4]) -> String {
        let workload = self.server.attributor.lookup(&ClientConn::from_pod(address.into())).ok();
        self.server.imds_tokens.issue(workload.as_ref(), address.into(), 21_600, UnixTime::now())
    }

    /// Sends bytes on one connection and half-closes it. Returns all that the server sends.
    pub(crate) async fn exchange_and_half_close(&self, request: &[u8], client: ClientConn) -> String {
        self.exchange_bytes(request, client, true).await
    }

    /// Sends a request with `Connection: close`. Returns all that the server sends.
    #[cfg(test)]
    pub(crate) async fn exchange(&self, request: &[u8], client: ClientConn) -> String {
        self.exchange_bytes(request, client, false).await
    }

    async fn exchange_bytes(&self, request: &[u8], client: ClientConn, half_close: bool) -> String {
        let (mut socket, stream) = tokio::io::duplex(BUFFER);
        let graceful = GracefulShutdown::new();
        let quota = SourceQuota::sample(self.metrics.clone());
        let mut responses = Vec::new();
        let exchange = async {
            // The server may close the connection before it has read everything.
            let _ = socket.write_all(request).await;
            if half_close {
                let _ = socket.shutdown().await;
            }
            socket.read_to_end(&mut responses).await.unwrap();
        };
        tokio::join!(
            self.server.serve_connection(stream, client, quota, ConnectionPermit::sample(), graceful.watcher()),
            exchange
        );
        String::from_utf8(responses).unwrap()
    }
}
