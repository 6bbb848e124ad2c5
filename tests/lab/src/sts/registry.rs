//! A stand-in for ECR, at the wire: a login for whoever signs with credentials that were issued here. It checks every
//! signature as the STS does. Knows nothing of who calls it.

use std::{net::TcpListener, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use serde_json::json;

use super::{identity, refusal::Refusal, world::Shared};
use crate::listener::{Body, Peer, Server, answer};

/// What the login consists of.
pub const PASSWORD: &str = "the-password-of-the-registry";
const USER: &str = "AWS";
const ACTION: &str = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken";
const JSON: &str = "application/x-amz-json-1.1";
/// That of AWS: 12 hours.
const LIFETIME: i64 = 43_200;

#[derive(Debug)]
pub struct Registry(Server);

impl Registry {
    pub(super) fn start(listener: TcpListener, shared: Arc<Shared>) -> anyhow::Result<Self> {
        let server = Server::start("ecr", listener, None, move |peer, request| {
            let answer = handle(&shared, &peer, &request);
            async { Ok(answer) }
        })?;
        Ok(Self(server))
    }

    /// For `AWS_ENDPOINT_URL_ECR`.
    pub fn url(&self) -> String {
        format!("http://{}", self.0.address())
    }
}

fn handle(shared: &Shared, peer: &Peer, request: &Request<Bytes>) -> Response<Body> {
    let action = request.headers().get("x-amz-target").and_then(|target| target.to_str().ok());
    match identity::of(shared, peer, request, "ecr") {
        Err(refusal) => refused(&refusal),
        Ok(_) if action != Some(ACTION) => refused(&Refusal::by_code("UnknownOperationException")),
        Ok(_) => {
            let login = BASE64_STANDARD.encode(format!("{USER}:{PASSWORD}"));
            let expires = shared.world().now().as_second() + LIFETIME;
            let body = json!({"authorizationData": [{"authorizationToken": login, "expiresAt": expires}]});
            answer(StatusCode::OK, JSON, body.to_string())
        }
    }
}

fn refused(refusal: &Refusal) -> Response<Body> {
    let body = json!({"__type": refusal.code, "message": refusal.message});
    answer(StatusCode::BAD_REQUEST, JSON, body.to_string())
}
