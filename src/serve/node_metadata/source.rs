//! Client of the node's own metadata service.

use std::{
    fmt,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::anyhow;
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};

use crate::{
    intercept::METADATA_V4,
    serve::{TOKEN, TOKEN_TTL},
};

const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum size of a value in bytes.
const MAX_VALUE: usize = 16 << 10;
/// How long an IMDS token is used: a minute less than its TTL.
const TOKEN_USE: Duration = Duration::from_secs(240);
/// The TTL of an IMDS token in seconds, as a header value.
const TOKEN_TTL_VALUE: &str = "300";

/// A source of values, so that tests need no network.
pub(super) trait Source: Sync {
    /// Returns the value at a path, or `None` if the node has none.
    fn get(&self, path: &str) -> impl Future<Output = Result<Option<Bytes>, FetchError>> + Send;
}

#[derive(Debug)]
pub(super) enum FetchError {
    /// The service has never responded: the node probably has none.
    NoService(anyhow::Error),
    /// The service exists, but the request failed.
    Failed(anyhow::Error),
}

impl FetchError {
    /// Returns a copy, for a path that depends on the failed one.
    pub(super) fn duplicate(&self) -> Self {
        match self {
            Self::NoService(error) => Self::NoService(anyhow!("{error:#}")),
            Self::Failed(error) => Self::Failed(anyhow!("{error:#}")),
        }
    }
}

impl fmt::Display for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::NoService(error) | Self::Failed(error)) = self;
        write!(f, "{error:#}")
    }
}

/// The service at its IPv4 address, with persistent connections. Not `Debug`: the IMDS token is the node's.
pub(super) struct NodeImds {
    client: Client<HttpConnector, Empty<Bytes>>,
    token: Mutex<TokenState>,
    has_responded: AtomicBool,
}

#[derive(Default)]
struct TokenState {
    token: Option<(Arc<str>, Instant)>,
    /// Time and error of the last failed attempt to get a token.
    failed: Option<(Instant, String)>,
}

impl NodeImds {
    pub(super) fn new() -> Self {
        let client = Client::builder(TokioExecutor::new()).build_http();
        Self { client, token: Mutex::default(), has_responded: AtomicBool::new(false) }
    }

    async fn token(&self) -> Result<Arc<str>, FetchError> {
        let since = Instant::now();
        let mut state = self.token.lock().await;
        if let Some((token, until)) = &state.token
            && since < *until
        {
            return Ok(token.clone());
        }
        // Share the error of an attempt that ended while this one waited for the lock: each may take the whole timeout.
        if let Some((at, error)) = &state.failed
            && since < *at
        {
            return Err(self.classify(anyhow!("{error}")));
        }
        let token = self.call(Method::PUT, "api/token", (TOKEN_TTL, TOKEN_TTL_VALUE)).await;
        match token.and_then(|token| Ok(String::from_utf8(token.unwrap_or_default().to_vec())?)) {
            Ok(token) => {
                self.has_responded.store(true, Ordering::Relaxed);
                let token: Arc<str> = token.into();
                *state = TokenState { token: Some((token.clone(), Instant::now() + TOKEN_USE)), failed: None };
                Ok(token)
            }
            Err(error) => {
                state.failed = Some((Instant::now(), format!("{error:#}")));
                Err(self.classify(error))
            }
        }
    }

    fn classify(&self, error: anyhow::Error) -> FetchError {
        if self.has_responded.load(Ordering::Relaxed) {
            FetchError::Failed(error)
        } else {
            FetchError::NoService(error)
        }
    }

    async fn call(&self, method: Method, path: &str, header: (&str, &str)) -> anyhow::Result<Option<Bytes>> {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{METADATA_V4}/latest/{path}"))
            .header(header.0, header.1)
            .body(Empty::<Bytes>::new())?;
        let response = async {
            let response = self.client.request(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_VALUE).collect().await;
            let body = body.map_err(|error| anyhow!("{error}"))?.to_bytes();
            match status {
                StatusCode::OK => Ok(Some(body)),
                StatusCode::NOT_FOUND => Ok(None),
                other => Err(anyhow!("{other}")),
            }
        };
        timeout(CALL_TIMEOUT, response).await?
    }
}

impl Source for NodeImds {
    async fn get(&self, path: &str) -> Result<Option<Bytes>, FetchError> {
        let token = self.token().await?;
        let value = self.call(Method::GET, path, (TOKEN.as_str(), &token)).await;
        if value.is_err() {
            // The cause may be the token.
            let mut state = self.token.lock().await;
            state.token.take_if(|(known, _)| *known == token);
        }
        value.map_err(FetchError::Failed)
    }
}
