//! The same switches as those of the handle, over HTTP, for another process or a shell with curl:
//!
//! | request                                      | does                                                |
//! |----------------------------------------------|-----------------------------------------------------|
//! | `GET /_control/calls?role=ARN`               | the call log, of one role or of all                 |
//! | `GET /_control/calls?count=N&seconds=S`      | the same, once there are so many; 408 after S s     |
//! | `DELETE /_control/calls`                     | forgets the log                                     |
//! | `POST /_control/faults`                      | one fault more                                      |
//! | `DELETE /_control/faults`                    | heals                                               |
//! | `PUT /_control/roles`, `DELETE …?role=ARN`   | adds or replaces a role, removes one                |
//! | `GET`, `PUT /_control/settings`              | dialect, clock skew, length of sessions             |
//! | `GET`, `DELETE /_control/sessions`           | who was issued what; makes all of them expire now   |
//!
//! Bodies are JSON, in the form of the types of the same names.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use serde::{Serialize, de::DeserializeOwned};

use super::{call::Call, protocol::Params, session::Session, world::Shared};
use crate::listener::{Answer, Body, Peer, answer};

const WAIT_AT_MOST: u64 = 10;

pub(super) async fn handle(shared: Arc<Shared>, _: Peer, request: Request<Bytes>) -> Answer {
    let params = Params::parse(request.uri().query(), &[]);
    let body = request.body();
    let what = request.uri().path().strip_prefix("/_control/").unwrap_or_default();
    Ok(match (request.method(), what) {
        (&Method::GET, "calls") => calls(shared, &params).await,
        (&Method::DELETE, "calls") => {
            shared.log.forget();
            done()
        }
        (&Method::POST, "faults") => take(body, |fault| shared.world().faults.add(fault)),
        (&Method::DELETE, "faults") => {
            shared.world().faults.clear();
            done()
        }
        (&Method::PUT, "roles") => take(body, |role| shared.world().set_role(role)),
        (&Method::DELETE, "roles") => {
            shared.world().roles.remove(params.get("role").unwrap_or_default());
            done()
        }
        (&Method::GET, "settings") => json(&shared.world().settings),
        (&Method::PUT, "settings") => take(body, |settings| shared.world().settings = settings),
        (&Method::GET, "sessions") => json(&shared.world().sessions.iter().cloned().collect::<Vec<Session>>()),
        (&Method::DELETE, "sessions") => {
            shared.world().expire_sessions();
            done()
        }
        _ => answer(StatusCode::NOT_FOUND, "text/plain", "no such switch\n"),
    })
}

async fn calls(shared: Arc<Shared>, params: &Params) -> Response<Body> {
    let number = |name| params.get(name).and_then(|value| value.parse::<u64>().ok());
    let role = params.get("role").map(str::to_owned);
    let count = number("count").and_then(|count| usize::try_from(count).ok()).unwrap_or(0);
    let deadline = Duration::from_secs(number("seconds").unwrap_or(WAIT_AT_MOST));
    let of_role = move |calls: &[Call]| -> Vec<Call> {
        calls.iter().filter(|call| role.as_ref().is_none_or(|role| *role == call.role_arn)).cloned().collect()
    };
    // The wait blocks its thread, and this one serves the other switches meanwhile.
    let waited = tokio::task::spawn_blocking(move || {
        let calls = shared.log.wait(deadline, |calls| of_role(calls).len() >= count)?;
        anyhow::Ok(of_role(&calls))
    });
    match waited.await {
        Ok(Ok(calls)) => json(&calls),
        _ => answer(StatusCode::REQUEST_TIMEOUT, "text/plain", "there were not so many calls in that time\n"),
    }
}

fn take<T: DeserializeOwned>(body: &[u8], set: impl FnOnce(T)) -> Response<Body> {
    match serde_json::from_slice(body) {
        Ok(value) => {
            set(value);
            done()
        }
        Err(error) => answer(StatusCode::BAD_REQUEST, "text/plain", format!("{error}\n")),
    }
}

fn json(value: &impl Serialize) -> Response<Body> {
    match serde_json::to_vec_pretty(value) {
        Ok(body) => answer(StatusCode::OK, "application/json", body),
        Err(error) => answer(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{error}\n")),
    }
}

fn done() -> Response<Body> {
    answer(StatusCode::OK, "text/plain", "")
}
