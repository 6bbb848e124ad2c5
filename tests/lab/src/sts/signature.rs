//! AWS Signature Version 4, verified: the signature is computed again from the request and compared.

use std::collections::BTreeMap;

use aws_lc_rs::{constant_time, digest, hmac};
use bytes::Bytes;
use http::{Request, header};
use jiff::{Timestamp, fmt::strtime};

use super::{refusal::Refusal, session::Session};

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const UNSIGNED: &str = "UNSIGNED-PAYLOAD";
/// How far the clock of a signer may be off.
const CLOCK_TOLERANCE: i64 = 300;

/// What the `Authorization` header says.
pub(super) struct Signature<'a> {
    pub(super) access_key_id: &'a str,
    scope: &'a str,
    signed_headers: &'a str,
    signature: &'a str,
}

impl<'a> Signature<'a> {
    pub(super) fn of(request: &'a Request<Bytes>) -> Result<Self, Refusal> {
        let header = header_of(request, header::AUTHORIZATION.as_str())
            .ok_or_else(|| Refusal::by_code("MissingAuthenticationToken"))?;
        Self::parse(header).ok_or_else(|| Refusal::by_code("IncompleteSignature"))
    }

    fn parse(header: &'a str) -> Option<Self> {
        let fields = header.strip_prefix(ALGORITHM)?.split(',');
        let fields: BTreeMap<&str, &str> = fields.filter_map(|field| field.trim().split_once('=')).collect();
        let (access_key_id, scope) = fields.get("Credential")?.split_once('/')?;
        Some(Self {
            access_key_id,
            scope,
            signed_headers: fields.get("SignedHeaders")?,
            signature: fields.get("Signature")?,
        })
    }

    /// Checks the request to a service against the session that it says it was signed with.
    pub(super) fn verify(
        &self,
        request: &Request<Bytes>,
        service: &str,
        session: &Session,
        now: Timestamp,
    ) -> Result<(), Refusal> {
        if header_of(request, "x-amz-security-token") != Some(&session.session_token) {
            return Err(Refusal::by_code("InvalidClientTokenId"));
        }
        if now >= session.expiration {
            return Err(Refusal::by_code("ExpiredToken"));
        }
        let incomplete = || Refusal::by_code("IncompleteSignature");
        let date = header_of(request, "x-amz-date").ok_or_else(incomplete)?;
        let signed_at = parse_date(date).ok_or_else(incomplete)?;
        if (now.as_second() - signed_at.as_second()).abs() > CLOCK_TOLERANCE {
            let message = format!("Signature expired: {date} is not within 5 min. of {}", basic(now));
            return Err(Refusal::new("SignatureDoesNotMatch", message));
        }
        let expected = self.compute(request, service, &session.secret_access_key, date).ok_or_else(incomplete)?;
        constant_time::verify_slices_are_equal(expected.as_bytes(), self.signature.as_bytes())
            .map_err(|_| Refusal::by_code("SignatureDoesNotMatch"))
    }

    fn compute(&self, request: &Request<Bytes>, service: &str, secret: &str, date: &str) -> Option<String> {
        let mut scope = self.scope.split('/');
        let (day, region) = (scope.next()?, scope.next()?);
        if scope.next() != Some(service) || scope.next() != Some("aws4_request") || !date.starts_with(day) {
            return None;
        }
        let names: Vec<&str> = self.signed_headers.split(';').collect();
        // An unsigned host would let a signature be replayed elsewhere, an unsigned date, later.
        if !names.contains(&"host") || !names.contains(&"x-amz-date") {
            return None;
        }
        let mut headers = String::new();
        for name in &names {
            let values: Vec<String> = request.headers().get_all(*name).iter().map(collapse).collect::<Option<_>>()?;
            headers.push_str(&format!("{name}:{}\n", values.join(",")));
        }
        let canonical = format!(
            "{}\n{}\n{}\n{headers}\n{}\n{}",
            request.method(),
            request.uri().path(),
            canonical_query(request.uri().query().unwrap_or_default()),
            self.signed_headers,
            payload(request, service)?,
        );
        let to_sign = format!("{ALGORITHM}\n{date}\n{}\n{}", self.scope, sha256(canonical.as_bytes()));
        let key = [day, region, service, "aws4_request"]
            .iter()
            .fold(format!("AWS4{secret}").into_bytes(), |key, part| sign(&key, part).as_ref().to_vec());
        Some(hex(sign(&key, &to_sign).as_ref()))
    }
}

fn header_of<'a>(request: &'a Request<Bytes>, name: &str) -> Option<&'a str> {
    request.headers().get(name)?.to_str().ok()
}

/// What stands for the body. S3 lets its clients leave it out of the signature, and has them say so.
fn payload(request: &Request<Bytes>, service: &str) -> Option<String> {
    let hash = sha256(request.body());
    let said = header_of(request, "x-amz-content-sha256").unwrap_or(&hash);
    (said == hash || (service == "s3" && said == UNSIGNED)).then(|| said.to_owned())
}

/// Trimmed, with runs of spaces made one.
fn collapse(value: &http::HeaderValue) -> Option<String> {
    Some(value.to_str().ok()?.split_ascii_whitespace().collect::<Vec<_>>().join(" "))
}

/// The pairs of a query are sorted as they are encoded.
fn canonical_query(query: &str) -> String {
    let mut pairs: Vec<String> = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| if pair.contains('=') { pair.to_owned() } else { format!("{pair}=") })
        .collect();
    pairs.sort_unstable();
    pairs.join("&")
}

fn parse_date(date: &str) -> Option<Timestamp> {
    let parsed = strtime::parse("%Y%m%dT%H%M%SZ", date).ok()?.to_datetime().ok()?;
    Some(parsed.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp())
}

fn basic(at: Timestamp) -> String {
    at.strftime("%Y%m%dT%H%M%SZ").to_string()
}

fn sign(key: &[u8], message: &str) -> hmac::Tag {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), message.as_bytes())
}

fn sha256(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
