//! SDK interceptors: response validation, connection poisoning and clock skew measurement.

use std::time::Duration;

use aws_sdk_sts::config::{
    ConfigBag, Intercept, RuntimeComponents,
    interceptors::{AfterDeserializationInterceptorContextRef, FinalizerInterceptorContextRef},
};
use aws_smithy_runtime_api::{box_error::BoxError, client::connection::CaptureSmithyConnection};
use tracing::warn;

use super::http_date;
use crate::{clock::UnixTime, observe::Metrics};

/// Last bytes of a complete response.
const CLOSING_TAG: &[u8] = b"</AssumeRoleWithWebIdentityResponse>";

/// Rejects a truncated response. The SDK would accept what it has parsed by then: half a session token, or an expiration
/// in 1970.
#[derive(Debug)]
pub(super) struct CompleteResponse;

impl Intercept for CompleteResponse {
    fn name(&self) -> &'static str {
        "CompleteResponse"
    }

    fn read_after_deserialization(
        &self,
        context: &AfterDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if context.output_or_error().is_err() {
            // Another error here would replace the original one.
            return Ok(());
        }
        let response = context.response();
        let complete = response.body().bytes().is_some_and(|body| body.trim_ascii_end().ends_with(CLOSING_TAG));
        if response.status().is_success() && !complete {
            return Err("the response is not an AssumeRoleWithWebIdentityResponse, or is truncated".into());
        }
        Ok(())
    }
}

/// Poisons the connection of a request that timed out, so that the pool does not reuse it. Dropping an HTTP/2 request
/// resets only its stream: without this, each exchange would use the dead connection until TCP gives up after a quarter
/// of an hour. The SDK poisons connections only after error responses.
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

/// Clock skew that is logged. STS rejects tokens beyond it.
const MAX_CLOCK_SKEW: Duration = Duration::from_secs(300);

/// Measures clock skew by the `Date` header of each response, errors included. The session's expiration would not do: a
/// store decides freely how long its sessions last.
#[derive(Debug)]
pub(super) struct ClockSkewMonitor {
    pub(super) metrics: Metrics,
}

impl Intercept for ClockSkewMonitor {
    fn name(&self) -> &'static str {
        "ClockSkewMonitor"
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
        if ahead.unsigned_abs() > MAX_CLOCK_SKEW.as_secs() {
            let direction = if ahead > 0 { "ahead of" } else { "behind" };
            warn!(seconds = ahead.abs(), "this node's clock is {direction} STS: check its time synchronization");
        }
        Ok(())
    }
}
