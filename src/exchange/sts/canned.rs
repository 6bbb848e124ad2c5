//! An STS client with canned responses, for tests: the HTTP connector inside the SDK is replaced, so the whole response
//! handling runs without a network.

use std::sync::Arc;

use aws_sdk_sts::config::http::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::http::{HttpConnector, HttpConnectorFuture, SharedHttpConnector, http_client_fn};
use parking_lot::Mutex;

use super::{Metrics, Sts};

/// Status and body of the following responses.
#[derive(Debug, Clone, Default)]
pub(crate) struct CannedResponse(Arc<Mutex<(u16, Vec<u8>)>>);

impl CannedResponse {
    pub(crate) fn set(&self, status: u16, body: &[u8]) {
        *self.0.lock() = (status, body.to_vec());
    }
}

impl HttpConnector for CannedResponse {
    fn call(&self, _: HttpRequest) -> HttpConnectorFuture {
        let (status, body) = self.0.lock().clone();
        let status = status.try_into().unwrap_or_else(|_| 500.try_into().expect("a status"));
        HttpConnectorFuture::ready(Ok(HttpResponse::new(status, body.into())))
    }
}

impl Sts {
    pub(crate) fn canned(response: CannedResponse, metrics: Metrics) -> Self {
        let client = http_client_fn(move |_, _| SharedHttpConnector::new(response.clone()));
        Self::from_config(Self::config("eu-central-1".into(), None).http_client(client), metrics)
    }
}
