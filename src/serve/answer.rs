//! The responses, byte for byte as SDKs want them.

use bytes::Bytes;
use http::{
    HeaderValue, Response, StatusCode,
    header::{CONTENT_TYPE, SERVER},
};
use http_body_util::Full;

use super::TOKEN_TTL;
use crate::{authorise::RoleArn, clock::UnixTime, intercept::Service, refusal::Reason};

/// Without a newline at the end: 15 of 56 SDKs would take it for part of a role's name (IMDS-9).
pub(super) fn text(text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    response(StatusCode::OK, "text/plain", text.into())
}

pub(super) fn document(json: Bytes) -> Response<Full<Bytes>> {
    response(StatusCode::OK, "application/json", json)
}

/// Terraform takes the account from here: that of the pod's role, never the node's (IMDS-31). `None` where the store
/// has no accounts.
pub(super) fn iam_info(role: &RoleArn, now: UnixTime) -> Option<Response<Full<Bytes>>> {
    let partition = role.as_str().split(':').nth(1)?;
    let profile = format!("arn:{partition}:iam::{}:instance-profile/{}", role.account()?, role.alias());
    let info = serde_json::json!({
        "Code": "Success",
        "LastUpdated": now.iso8601(),
        "InstanceProfileArn": profile,
        // IAM's ids are 21 characters; there is no profile that this could be the id of.
        "InstanceProfileId": "AIPAKIRSA000000000000",
    });
    Some(text(info.to_string()))
}

/// The Rust SDK fails without the header, and Go's falls back to IMDSv1 (IMDS-1).
pub(super) fn token(token: String, ttl: u32) -> Response<Full<Bytes>> {
    let mut response = text(token);
    response.headers_mut().insert(TOKEN_TTL, HeaderValue::from(ttl));
    response
}

/// Short and fixed, and without a word of what is behind it.
pub(super) fn refuse(service: Service, reason: Reason) -> Response<Full<Bytes>> {
    let status = StatusCode::from_u16(reason.spec().status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    match service {
        Service::Metadata => response(status, "text/html", Bytes::from_static(page(status).as_bytes())),
        // As the EKS Pod Identity agent does: a line of text, which SDKs put into their error.
        Service::Container => {
            response(status, "text/plain; charset=utf-8", Bytes::from_static(line(status).as_bytes()))
        }
    }
}

/// With a `<` and a newline, so that SDKs that ignore the status cannot take it for a role's name (IMDS-12).
fn page(status: StatusCode) -> &'static str {
    match status {
        StatusCode::BAD_REQUEST => "<html>\n<title>400 - Bad Request</title>\n</html>\n",
        StatusCode::UNAUTHORIZED => "<html>\n<title>401 - Unauthorized</title>\n</html>\n",
        StatusCode::FORBIDDEN => "<html>\n<title>403 - Forbidden</title>\n</html>\n",
        StatusCode::NOT_FOUND => "<html>\n<title>404 - Not Found</title>\n</html>\n",
        StatusCode::METHOD_NOT_ALLOWED => "<html>\n<title>405 - Method Not Allowed</title>\n</html>\n",
        _ => "<html>\n<title>503 - Service Unavailable</title>\n</html>\n",
    }
}

fn line(status: StatusCode) -> &'static str {
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
    // Tells whoever debugs in a pod who answered; EC2 says `EC2ws`.
    response.headers_mut().insert(SERVER, HeaderValue::from_static("kirsa"));
    response
}
