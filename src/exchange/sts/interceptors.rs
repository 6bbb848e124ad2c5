//! What is seen of every answer of STS before the SDK makes something of it, and done where there was none.

use aws_sdk_sts::config::{
    ConfigBag, Intercept, RuntimeComponents,
    interceptors::{AfterDeserializationInterceptorContextRef, FinalizerInterceptorContextRef},
};
use aws_smithy_runtime_api::{box_error::BoxError, client::connection::CaptureSmithyConnection};
use tracing::warn;

use super::http_date;
use crate::{clock::UnixTime, observe::Metrics};

/// What an answer that is whole ends with.
const END: &[u8] = b"</AssumeRoleWithWebIdentityResponse>";

/// Refuses an answer that was cut short. The SDK takes what it has read by then: a session token that ends in the
/// middle, or an expiration in 1970.
#[derive(Debug)]
pub(super) struct CompleteResponse;

impl Intercept for CompleteResponse {
    fn name(&self) -> &'static str {
        "WholeAnswer"
    }

    fn read_after_deserialization(
        &self,
        context: &AfterDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if context.output_or_error().is_err() {
            // It has failed for a reason of its own, which another one would take the place of.
            return Ok(());
        }
        let answer = context.response();
        let whole = answer.body().bytes().is_some_and(|body| body.trim_ascii_end().ends_with(END));
        if answer.status().is_success() && !whole {
            return Err("the answer is no AssumeRoleWithWebIdentityResponse, or was cut short".into());
        }
        Ok(())
    }
}

/// Uses no connection again on which there was no answer in time. The SDK does that after answers that are errors, and
/// what is dropped is closed with HTTP/1.1; of HTTP/2 only the request would be: each exchange would go to the dead
/// connection until TCP has given up too, a quarter of an hour later.
#[derive(Debug)]
pub(super) struct PoisonOnTimeout;

impl Intercept for PoisonOnTimeout {
    fn name(&self) -> &'static str {
        "PoisonOnTimeout"
    }

    fn read_after_attempt(
        &self,
        context: &FinalizerInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        state: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if context.output_or_error().is_some_and(|result| result.is_err_and(|error| error.is_timeout_error()))
            && let Some(connection) = state.load::<CaptureSmithyConnection>().and_then(CaptureSmithyConnection::get)
        {
            connection.poison();
        }
        Ok(())
    }
}

/// A difference of clocks that is worth an operator's attention: STS itself refuses tokens beyond it.
const SKEW: i64 = 300;

/// Compares the clocks by the `Date` of each answer, refusals included: how long a session lasts is the store's own
/// affair, and says nothing of them.
#[derive(Debug)]
pub(super) struct Clock {
    pub(super) metrics: Metrics,
}

impl Intercept for Clock {
    fn name(&self) -> &'static str {
        "Clock"
    }

    fn read_after_deserialization(
        &self,
        context: &AfterDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let (Some(theirs), ours) = (context.response().headers().get("date").and_then(http_date), UnixTime::now())
        else {
            return Ok(());
        };
        let signed = |time: UnixTime| i64::try_from(time.0).unwrap_or(i64::MAX);
        let ahead = signed(ours) - signed(theirs);
        self.metrics.clock_skew.set(ahead);
        if ahead.abs() > SKEW {
            let which = if ahead > 0 { "ahead of" } else { "behind" };
            warn!(seconds = ahead.abs(), "this node's clock is {which} that of STS: set it");
        }
        Ok(())
    }
}
