//! Reachability check for `kirsa doctor`: sends an invalid token, which an STS must reject.

use aws_sdk_sts::{error::SdkError, primitives::DateTimeFormat};

use super::{Sts, UnixTime, classify_error};
use crate::refusal::Reason;

/// A role that does not exist. STS rejects the token before it looks up the role.
const ROLE: &str = "arn:aws:iam::000000000000:role/kirsa-doctor";
const SESSION: &str = "kirsa-doctor";

/// Response of the endpoint to an invalid token.
#[derive(Debug)]
pub struct Reachability {
    /// Reason of the rejection; `None` if the endpoint accepted the token.
    pub reason: Option<Reason>,
    /// Message of the endpoint, or of the layer that failed.
    pub message: String,
    /// Time in the `Date` header.
    pub server_time: Option<UnixTime>,
}

impl Sts {
    /// Requests a session with a token that no STS may accept.
    pub async fn check_reachable(&self) -> Reachability {
        let call = self.client.assume_role_with_web_identity();
        let call = call.role_arn(ROLE).role_session_name(SESSION).web_identity_token("no.web.identity-token");
        let error = match call.send().await {
            Ok(_) => {
                let message = "it accepted an invalid token".into();
                return Reachability { reason: None, message, server_time: None };
            }
            Err(error) => error,
        };
        let (reason, message) = classify_error(&error);
        let response = match &error {
            SdkError::ServiceError(context) => Some(context.raw()),
            SdkError::ResponseError(context) => Some(context.raw()),
            _ => None,
        };
        Reachability {
            reason: Some(reason),
            message,
            server_time: response.and_then(|response| http_date(response.headers().get("date")?)),
        }
    }
}

/// Parses a `Date` header.
pub fn http_date(text: &str) -> Option<UnixTime> {
    let time = aws_sdk_sts::primitives::DateTime::from_str(text, DateTimeFormat::HttpDate).ok()?;
    u64::try_from(time.secs()).ok().map(UnixTime)
}
