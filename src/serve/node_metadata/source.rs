//! The node's own metadata service, asked by kirsa itself.

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

const CALL: Duration = Duration::from_secs(2);
const MAX_VALUE: usize = 16 << 10;
/// How long a session token is used, and how long it is good for.
const USE_TOKEN: Duration = Duration::from_secs(240);
const TOKEN_LIFE: &str = "300";

/// Where values are read from.
pub(super) trait Source: Sync {
    /// `None` for what the node does not have.
    fn get(&self, path: &str) -> impl Future<Output = Result<Option<Bytes>, Failure>> + Send;
}

#[derive(Debug)]
pub(super) enum Failure {
    /// There is no such service, as far as is known: it has never answered.
    NoService(anyhow::Error),
    /// It did not answer this.
    Failed(anyhow::Error),
}

impl Failure {
    /// The same of something that rests on it.
    pub(super) fn again(&self) -> Self {
        match self {
            Self::NoService(error) => Self::NoService(anyhow!("{error:#}")),
            Self::Failed(error) => Self::Failed(anyhow!("{error:#}")),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::NoService(error) | Self::Failed(error)) = self;
        write!(f, "{error:#}")
    }
}

/// The service at its IPv4 address, over connections that are kept. Not `Debug`: its session token is the node's.
pub(super) struct Imds {
    client: Client<HttpConnector, Empty<Bytes>>,
    session: Mutex<Session>,
    answered: AtomicBool,
}

#[derive(Default)]
struct Session {
    token: Option<(Arc<str>, Instant)>,
    /// When the last attempt to get one ended, and how.
    failed: Option<(Instant, String)>,
}

impl Imds {
    pub(super) fn new() -> Self {
        let client = Client::builder(TokioExecutor::new()).build_http();
        Self { client, session: Mutex::default(), answered: AtomicBool::new(false) }
    }

    async fn token(&self) -> Result<Arc<str>, Failure> {
        let since = Instant::now();
        let mut session = self.session.lock().await;
        if let Some((token, until)) = &session.token
            && since < *until
        {
            return Ok(token.clone());
        }
        // Share an attempt that failed while this one waited for it: each may take the whole time-out.
        if let Some((at, error)) = &session.failed
            && since < *at
        {
            return Err(self.failure(anyhow!("{error}")));
        }
        let token = self.call(Method::PUT, "api/token", (TOKEN_TTL, TOKEN_LIFE)).await;
        match token.and_then(|token| Ok(String::from_utf8(token.unwrap_or_default().to_vec())?)) {
            Ok(token) => {
                self.answered.store(true, Ordering::Relaxed);
                let token: Arc<str> = token.into();
                *session = Session { token: Some((token.clone(), Instant::now() + USE_TOKEN)), failed: None };
                Ok(token)
            }
            Err(error) => {
                session.failed = Some((Instant::now(), format!("{error:#}")));
                Err(self.failure(error))
            }
        }
    }

    fn failure(&self, error: anyhow::Error) -> Failure {
        if self.answered.load(Ordering::Relaxed) { Failure::Failed(error) } else { Failure::NoService(error) }
    }

    async fn call(&self, method: Method, path: &str, header: (&str, &str)) -> anyhow::Result<Option<Bytes>> {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{METADATA_V4}/latest/{path}"))
            .header(header.0, header.1)
            .body(Empty::<Bytes>::new())?;
        let answer = async {
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
        timeout(CALL, answer).await?
    }
}

impl Source for Imds {
    async fn get(&self, path: &str) -> Result<Option<Bytes>, Failure> {
        let token = self.token().await?;
        let answer = self.call(Method::GET, path, (TOKEN.as_str(), &token)).await;
        if answer.is_err() {
            // It may be the token that is not good any more.
            let mut session = self.session.lock().await;
            session.token.take_if(|(known, _)| *known == token);
        }
        answer.map_err(Failure::Failed)
    }
}
