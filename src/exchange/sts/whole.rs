//! Refuses an answer of STS that was cut short. The SDK takes what it has read by then: a session token that ends in
//! the middle, or an expiration in 1970.

use aws_sdk_sts::config::{
    ConfigBag, Intercept, RuntimeComponents, interceptors::AfterDeserializationInterceptorContextRef,
};
use aws_smithy_runtime_api::box_error::BoxError;

/// What an answer that is whole ends with.
const END: &[u8] = b"</AssumeRoleWithWebIdentityResponse>";

#[derive(Debug)]
pub(super) struct WholeAnswer;

impl Intercept for WholeAnswer {
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
