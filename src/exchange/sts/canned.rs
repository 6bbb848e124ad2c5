//! An STS that answers what it was told to, from inside the SDK: everything that happens to an answer happens to this
//! one too, without a network. For tests only.

use std::sync::{Arc, Mutex, PoisonError};

use aws_sdk_sts::config::http::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::http::{HttpConnector, HttpConnectorFuture, SharedHttpConnector, http_client_fn};

use super::{Metrics, Sts};

/// Status and body of the next answers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answer(Arc<Mutex<(u16, Vec<u8>)>>);

impl Answer {
    pub(crate) fn set(&self, status: u16, body: &[u8]) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (status, body.to_vec());
    }
}

impl HttpConnector for Answer {
    fn call(&self, _: HttpRequest) -> HttpConnectorFuture {
        let (status, body) = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let status = status.try_into().unwrap_or_else(|_| 500.try_into().expect("a status"));
        HttpConnectorFuture::ready(Ok(HttpResponse::new(status, body.into())))
    }
}

impl Sts {
    pub(crate) fn canned(answer: Answer, metrics: Metrics) -> Self {
        let client = http_client_fn(move |_, _| SharedHttpConnector::new(answer.clone()));
        Self::of(Self::config("eu-central-1".into(), None).http_client(client), metrics)
    }
}
