//! The listener of the STS: one request to one action, through the faults that are in force.

use std::{future, io, sync::Arc};

use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};

use super::{
    ask::Ask,
    call::Outcome,
    fault::Effect,
    identity,
    protocol::{self, Node, Params, text},
    refusal::Refusal,
    session, web_identity,
    world::{Dialect, Shared},
};
use crate::listener::{Answer, Body, Peer, answer, full};

const WEB_IDENTITY: &str = "AssumeRoleWithWebIdentity";
const CALLER_IDENTITY: &str = "GetCallerIdentity";
const XML: &str = "text/xml";

pub(super) async fn handle(shared: Arc<Shared>, peer: Peer, request: Request<Bytes>) -> Answer {
    let params = Params::parse(request.uri().query(), request.body());
    let action = params.get("Action").unwrap_or_default();
    match (action, params.get("Version")) {
        (WEB_IDENTITY, Some(protocol::VERSION)) => assume(&shared, &peer, &Ask::read(&params)).await,
        (CALLER_IDENTITY, Some(protocol::VERSION)) => {
            Ok(render(&shared, CALLER_IDENTITY, caller_identity(&shared, &peer, &request)))
        }
        ("", _) => Ok(render(&shared, action, Err(Refusal::by_code("MissingAuthenticationToken")))),
        (_, version) => {
            let version = version.unwrap_or("NO_VERSION_SPECIFIED");
            let message = format!("Could not find operation {action} for version {version}");
            Ok(render(&shared, action, Err(Refusal::new("InvalidAction", message))))
        }
    }
}

async fn assume(shared: &Shared, peer: &Peer, ask: &Ask) -> Answer {
    let call = shared.log.open(ask.call());
    let (delay, effect) = shared.world().faults.strike(ask.role());
    tokio::time::sleep(delay).await;
    let refuse = |refusal: Refusal| {
        shared.log.close(call, Outcome::Refused { code: refusal.code.clone() });
        Ok(render(shared, WEB_IDENTITY, Err(refusal)))
    };
    match effect {
        Some(Effect::Error { code, message: None }) => return refuse(Refusal::by_code(&code)),
        Some(Effect::Error { code, message: Some(message) }) => return refuse(Refusal::new(&code, message)),
        Some(Effect::Status(status)) => return refuse(by_status(status)),
        Some(Effect::NoAnswer) => {
            shared.log.close(call, Outcome::Spoilt);
            future::pending::<()>().await;
        }
        Some(Effect::Reset) => {
            shared.log.close(call, Outcome::Spoilt);
            return Err(peer.reset());
        }
        // The others spoil a good answer.
        _ => {}
    }
    let (session, result) = match web_identity::assume(shared, ask).await {
        Ok(issued) => issued,
        Err(refusal) => return refuse(refusal),
    };
    let response = render(shared, WEB_IDENTITY, Ok(result));
    match effect {
        Some(spoil) => {
            shared.log.close(call, Outcome::Spoilt);
            spoilt(response, &spoil).await
        }
        None => {
            shared.log.close(call, Outcome::Issued { access_key_id: session.access_key_id });
            Ok(response)
        }
    }
}

fn caller_identity(shared: &Shared, peer: &Peer, request: &Request<Bytes>) -> Result<Vec<Node>, Refusal> {
    let session = identity::of(shared, peer, request, "sts")?;
    Ok(vec![text("Arn", &session.arn), text("UserId", &session.user_id), text("Account", &session.account)])
}

fn by_status(status: u16) -> Refusal {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let code = if status == StatusCode::SERVICE_UNAVAILABLE { "ServiceUnavailable" } else { "InternalFailure" };
    Refusal { status, ..Refusal::by_code(code) }
}

fn render(shared: &Shared, action: &str, result: Result<Vec<Node>, Refusal>) -> Response<Body> {
    let (now, dialect) = {
        let world = shared.world();
        (world.now(), world.settings.dialect)
    };
    let id = session::request_id();
    let (status, xml) = match result {
        Ok(result) => (StatusCode::OK, protocol::response(action, result, &id)),
        Err(mut refusal) => {
            if dialect == Dialect::Minio && refusal.status.is_client_error() {
                refusal.status = StatusCode::BAD_REQUEST;
                refusal.code = "InvalidParameterValue".to_owned();
            }
            (refusal.status, protocol::error_response(&refusal, &id))
        }
    };
    let mut response = answer(status, XML, xml);
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(&id) {
        headers.insert("x-amzn-requestid", id);
    }
    let date = jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&now);
    if let Some(date) = date.ok().and_then(|date| HeaderValue::from_str(&date).ok()) {
        headers.insert(header::DATE, date);
    }
    response
}

/// A good answer that is spoilt on its way out.
async fn spoilt(response: Response<Body>, effect: &Effect) -> Answer {
    let (mut head, body) = response.into_parts();
    let body = body.collect().await?.to_bytes();
    let half = body.slice(..body.len() / 2);
    match effect {
        Effect::TruncatedXml => Ok(Response::from_parts(head, full(half))),
        Effect::MalformedXml => {
            let xml = String::from_utf8_lossy(&body).replacen('<', "<<", 1);
            Ok(Response::from_parts(head, full(xml)))
        }
        Effect::NoCredentials => {
            let xml = String::from_utf8_lossy(&body).into_owned();
            let (before, rest) = xml.split_once("<Credentials>").unwrap_or_default();
            let (_, after) = rest.split_once("</Credentials>").unwrap_or_default();
            Ok(Response::from_parts(head, full(format!("{before}{after}"))))
        }
        _ => {
            head.headers.insert(header::CONTENT_LENGTH, body.len().into());
            let sent = stream::once(future::ready(Ok(Frame::data(half))));
            let cut = stream::once(async {
                // Yielding lets the half go out before the connection ends.
                tokio::task::yield_now().await;
                Err(io::Error::from(io::ErrorKind::BrokenPipe))
            });
            Ok(Response::from_parts(head, StreamBody::new(sent.chain(cut)).boxed_unsync()))
        }
    }
}
