//! Whether an STS is there and answers like one, found out with a token that is none: it must be refused.

use aws_sdk_sts::{error::SdkError, primitives::DateTimeFormat};

use super::{Sts, UnixTime, classified};
use crate::refusal::Reason;

/// Nobody's role: no STS gets as far as looking for it.
const ROLE: &str = "arn:aws:iam::000000000000:role/kirsa-doctor";
const SESSION: &str = "kirsa-doctor";

/// What the endpoint made of it.
#[derive(Debug)]
pub struct Reachability {
    /// Why it said no; `None` if it did not.
    pub reason: Option<Reason>,
    /// In its own words, or those of whatever came in between.
    pub said: String,
    /// What time it has.
    pub time: Option<UnixTime>,
}

impl Sts {
    /// Asks for a session with a token that no STS may accept.
    pub async fn check_reachable(&self) -> Reachability {
        let call = self.client.assume_role_with_web_identity();
        let call = call.role_arn(ROLE).role_session_name(SESSION).web_identity_token("no.web.identity-token");
        let error = match call.send().await {
            Ok(_) => return Reachability { reason: None, said: "it accepted a token that is none".into(), time: None },
            Err(error) => error,
        };
        let (reason, said) = classified(&error);
        let answer = match &error {
            SdkError::ServiceError(answer) => Some(answer.raw()),
            SdkError::ResponseError(answer) => Some(answer.raw()),
            _ => None,
        };
        Reachability {
            reason: Some(reason),
            said,
            time: answer.and_then(|answer| http_date(answer.headers().get("date")?)),
        }
    }
}

/// The time in a `Date` header.
pub fn http_date(text: &str) -> Option<UnixTime> {
    let time = aws_sdk_sts::primitives::DateTime::from_str(text, DateTimeFormat::HttpDate).ok()?;
    u64::try_from(time.secs()).ok().map(UnixTime)
}
