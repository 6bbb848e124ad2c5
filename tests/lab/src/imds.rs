//! The canary: a stand-in for the node's own EC2 metadata service, with the *node's* credentials to lose.
//!
//! It answers as EC2 does and notes every request. A hit from a pod means that a way leads around the
//! agent. Knows nothing of pods.

mod instance;

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aws_lc_rs::rand;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use jiff::{SignedDuration, Timestamp};

pub use instance::{Credentials, Instance, NODE_ACCESS_KEY_ID, NODE_ROLE};

use crate::listener::{Answer, Body, Peer, Server, answer};

const TOKEN: &str = "x-aws-ec2-metadata-token";
const TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const LONGEST_TTL: u32 = 21600;

/// One request, whatever its answer was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hit {
    pub from: SocketAddr,
    pub method: String,
    /// With its query, as it was sent.
    pub path: String,
}

#[derive(Debug)]
pub struct Canary {
    state: Arc<State>,
    server: Server,
}

#[derive(Debug)]
struct State {
    instance: Instance,
    /// By path: what it has besides, for as long as a test wants it to.
    more: Mutex<BTreeMap<String, String>>,
    hits: Mutex<Vec<Hit>>,
    tokens: Mutex<Vec<(String, Timestamp)>>,
}

impl Canary {
    /// Serves `listener` from a thread that lives in the network namespace of the caller's.
    pub fn start(listener: TcpListener, instance: Instance) -> anyhow::Result<Self> {
        let state =
            Arc::new(State { instance, more: Mutex::default(), hits: Mutex::default(), tokens: Mutex::default() });
        let shared = Arc::clone(&state);
        let server = Server::start("canary", listener, None, move |peer, request| {
            let answer = shared.handle(&peer, &request);
            async { answer }
        })?;
        Ok(Self { state, server })
    }

    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// Adds a document to the instance's own at a path such as `/latest/meta-data/mac`, or takes it away. The folders
    /// above it are listed.
    pub fn set(&self, path: &str, document: Option<&str>) {
        let mut more = lock(&self.state.more);
        match document {
            Some(document) => more.insert(path.to_owned(), document.to_owned()),
            None => more.remove(path),
        };
    }

    /// Every request so far.
    pub fn hits(&self) -> Vec<Hit> {
        lock(&self.state.hits).clone()
    }
}

impl State {
    fn handle(&self, peer: &Peer, request: &Request<Bytes>) -> Answer {
        let (method, path) = (request.method(), request.uri().path());
        let asked = request.uri().to_string();
        lock(&self.hits).push(Hit { from: peer.address, method: method.to_string(), path: asked });
        if path == "/latest/api/token" {
            return Ok(if method == Method::PUT { self.issue(request) } else { error(StatusCode::METHOD_NOT_ALLOWED) });
        }
        let token = request.headers().get(TOKEN).and_then(|token| token.to_str().ok());
        let known = token.map_or(!self.instance.requires_token, |token| self.is_valid(token));
        Ok(match (known, method) {
            (false, _) => error(StatusCode::UNAUTHORIZED),
            (true, &Method::GET | &Method::HEAD) => match self.document(path) {
                Some(body) => ec2(StatusCode::OK, "text/plain", body),
                None => error(StatusCode::NOT_FOUND),
            },
            (true, _) => error(StatusCode::METHOD_NOT_ALLOWED),
        })
    }

    fn document(&self, path: &str) -> Option<String> {
        self.instance.document(path).or_else(|| {
            let (more, path) = (lock(&self.more), path.trim_end_matches('/'));
            let below = more.keys().filter_map(|other| other.strip_prefix(path)?.strip_prefix('/'));
            let mut entries: Vec<_> = below.filter_map(|rest| rest.split_inclusive('/').next()).collect();
            entries.dedup();
            more.get(path).cloned().or_else(|| (!entries.is_empty()).then(|| entries.join("\n")))
        })
    }

    fn issue(&self, request: &Request<Bytes>) -> Response<Body> {
        let asked = request.headers().get(TTL).and_then(|ttl| ttl.to_str().ok()?.parse::<u32>().ok());
        let Some(ttl) = asked.filter(|ttl| (1..=LONGEST_TTL).contains(ttl)) else {
            return error(StatusCode::BAD_REQUEST);
        };
        // EC2 refuses a request that a proxy passed on.
        if request.headers().contains_key("x-forwarded-for") {
            return error(StatusCode::FORBIDDEN);
        }
        let mut bytes = [0; 40];
        rand::fill(&mut bytes).expect("the system has random numbers");
        let token = format!("AQAE{}", BASE64_STANDARD.encode(bytes));
        let end = Timestamp::now() + SignedDuration::from_secs(i64::from(ttl));
        lock(&self.tokens).push((token.clone(), end));
        let mut response = ec2(StatusCode::OK, "text/plain", token);
        response.headers_mut().insert(TTL, ttl.into());
        response
    }

    fn is_valid(&self, token: &str) -> bool {
        let now = Timestamp::now();
        lock(&self.tokens).iter().any(|(known, end)| known == token && now < *end)
    }
}

fn ec2(status: StatusCode, content_type: &'static str, body: String) -> Response<Body> {
    let mut response = answer(status, content_type, body);
    let headers = response.headers_mut();
    headers.insert(header::SERVER, HeaderValue::from_static("EC2ws"));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("none"));
    response
}

/// EC2 wraps its errors in a page.
fn error(status: StatusCode) -> Response<Body> {
    let title = format!("{} - {}", status.as_u16(), status.canonical_reason().unwrap_or_default());
    let page = format!(
        r#"<?xml version="1.0" encoding="iso-8859-1"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN"
	"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml" xml:lang="en" lang="en">
 <head>
  <title>{title}</title>
 </head>
 <body>
  <h1>{title}</h1>
 </body>
</html>
"#
    );
    ec2(status, "text/html", page)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
