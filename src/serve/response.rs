//! Responses, byte for byte as SDKs expect them.

use bytes::Bytes;
use http::{
    HeaderValue, Response, StatusCode,
    header::{CONTENT_TYPE, SERVER},
};
use http_body_util::Full;
use serde::Serialize;

use super::TOKEN_TTL;
use crate::{authorize::RoleArn, clock::UnixTime, exchange::json, intercept::MetadataService, refusal::Reason};

/// Appends no newline: 15 of 56 SDKs would take it for a part of the role's name (IMDS-9).
pub(super) fn text(text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    response(StatusCode::OK, "text/plain", text.into())
}

pub(super) fn document(json: Bytes) -> Response<Full<Bytes>> {
    response(StatusCode::OK, "application/json", json)
}

/// The members that EC2 has, in its order.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct IamInfo<'a> {
    code: &'a str,
    last_updated: &'a str,
    instance_profile_arn: &'a str,
    instance_profile_id: &'a str,
}

/// Returns `iam/info` with the account of the pod's role, never the node's: Terraform reads its account from here
/// (IMDS-31). Returns `None` for roles of an S3-compatible store, which have no account.
pub(super) fn iam_info(role: &RoleArn, now: UnixTime) -> Option<Response<Full<Bytes>>> {
    let partition = role.as_str().split(':').nth(1)?;
    let profile = format!("arn:{partition}:iam::{}:instance-profile/{}", role.account()?, role.alias());
    let info = IamInfo {
        code: "Success",
        last_updated: &now.iso8601(),
        instance_profile_arn: &profile,
        // IDs in IAM have 21 characters. No real profile has this one.
        instance_profile_id: "AIPAKIRSA000000000000",
    };
    json::ec2(&info).ok().map(text)
}

/// Adds the TTL header: without it the Rust SDK fails and the Go SDK falls back to IMDSv1 (IMDS-1).
pub(super) fn token(token: String, ttl: u32) -> Response<Full<Bytes>> {
    let mut response = text(token);
    response.headers_mut().insert(TOKEN_TTL, HeaderValue::from(ttl));
    response
}

/// Returns a short, fixed response that reveals no detail of the refusal.
pub(super) fn refuse(service: MetadataService, reason: Reason) -> Response<Full<Bytes>> {
    let status = StatusCode::from_u16(reason.info().status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    match service {
        MetadataService::Metadata => response(status, "text/html", Bytes::from_static(html_page(status).as_bytes())),
        // A line of text, as from the EKS Pod Identity agent: SDKs include it in their error.
        MetadataService::Container => {
            response(status, "text/plain; charset=utf-8", Bytes::from_static(text_line(status).as_bytes()))
        }
    }
}

/// Contains `<` and newlines, so that SDKs that ignore the status cannot take it for a role's name (IMDS-12).
fn html_page(status: StatusCode) -> &'static str {
    match status {
        StatusCode::BAD_REQUEST => "<html>\n<title>400 - Bad Request</title>\n</html>\n",
        StatusCode::UNAUTHORIZED => "<html>\n<title>401 - Unauthorized</title>\n</html>\n",
        StatusCode::FORBIDDEN => "<html>\n<title>403 - Forbidden</title>\n</html>\n",
        StatusCode::NOT_FOUND => "<html>\n<title>404 - Not Found</title>\n</html>\n",
        StatusCode::METHOD_NOT_ALLOWED => "<html>\n<title>405 - Method Not Allowed</title>\n</html>\n",
        _ => "<html>\n<title>503 - Service Unavailable</title>\n</html>\n",
    }
}

fn text_line(status: StatusCode) -> &'static str {
    match status {
        StatusCode::BAD_REQUEST => "the service account token is missing, or is not accepted\n",
        StatusCode::FORBIDDEN => "Access Denied\n",
        StatusCode::NOT_FOUND => "there is no such path, or no role for this pod\n",
        StatusCode::METHOD_NOT_ALLOWED => "Method Not Allowed\n",
        _ => "Service Unavailable\n",
    }
}

fn response(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    // Identifies kirsa to a person who debugs in a pod; EC2 sends `EC2ws`.
    response.headers_mut().insert(SERVER, HeaderValue::from_static("kirsa"));
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn iam_info_has_ec2s_bytes() {
        let role = RoleArn::parse("arn:aws:iam::111122223333:role/reader", false).unwrap();
        let response = iam_info(&role, UnixTime(1_767_225_600)).unwrap();
        let golden = concat!(
            "{\n",
            "  \"Code\" : \"Success\",\n",
            "  \"LastUpdated\" : \"2026-01-01T00:00:00Z\",\n",
            "  \"InstanceProfileArn\" : \"arn:aws:iam::111122223333:instance-profile/reader\",\n",
            "  \"InstanceProfileId\" : \"AIPAKIRSA000000000000\"\n",
            "}",
        );
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), golden.as_bytes());
    }
}
