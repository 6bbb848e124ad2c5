//! A stand-in for S3, at the wire: one bucket with one object, for programs that can prove who they are by reading
//! only. It checks every signature as the STS does and refuses in S3's own codes. Knows nothing of who calls it.

use std::{net::TcpListener, sync::Arc};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};

use super::{identity, refusal::Refusal, world::Shared};
use crate::listener::{Body, Peer, Server, answer};

pub const BUCKET: &str = "readings";
pub const KEY: &str = "grid.asc";
/// Something that GDAL can open.
const OBJECT: &str = "ncols 2\nnrows 2\nxllcorner 0\nyllcorner 0\ncellsize 1\n1 2\n3 4\n";
const ETAG: &str = "\"9b2cf535f27731c974343645a3985328\"";
const MODIFIED: &str = "Wed, 01 Jan 2025 00:00:00 GMT";
const XML: &str = "application/xml";
const NAMESPACE: &str = "http://s3.amazonaws.com/doc/2006-03-01/";

#[derive(Debug)]
pub struct ObjectStore(Server);

impl ObjectStore {
    pub(super) fn start(listener: TcpListener, shared: Arc<Shared>) -> anyhow::Result<Self> {
        let server = Server::start("s3", listener, None, move |peer, request| {
            let answer = handle(&shared, &peer, &request);
            async { Ok(answer) }
        })?;
        Ok(Self(server))
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.0.address())
    }
}

fn handle(shared: &Shared, peer: &Peer, request: &Request<Bytes>) -> Response<Body> {
    match identity::of(shared, peer, request, "s3") {
        Err(refusal) => refused(&refusal),
        Ok(_) if !matches!(*request.method(), Method::GET | Method::HEAD) => {
            error(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", "The specified method is not allowed.")
        }
        Ok(_) => read(request),
    }
}

fn read(request: &Request<Bytes>) -> Response<Body> {
    let query = request.uri().query().unwrap_or_default();
    let path = request.uri().path().trim_start_matches('/');
    let (bucket, key) = path.split_once('/').unwrap_or((path, ""));
    if bucket != BUCKET {
        return error(StatusCode::NOT_FOUND, "NoSuchBucket", "The specified bucket does not exist");
    }
    let asks = |name| form_urlencoded::parse(query.as_bytes()).any(|(key, _)| key == name);
    match key {
        "" if asks("location") => answer(StatusCode::OK, XML, location()),
        "" => {
            let prefix = form_urlencoded::parse(query.as_bytes()).find(|(key, _)| key == "prefix");
            answer(StatusCode::OK, XML, list(&prefix.map(|(_, prefix)| prefix).unwrap_or_default()))
        }
        KEY => object(request),
        _ => error(StatusCode::NOT_FOUND, "NoSuchKey", "The specified key does not exist."),
    }
}

fn object(request: &Request<Bytes>) -> Response<Body> {
    let range = request.headers().get(header::RANGE).and_then(|range| range.to_str().ok());
    let mut response = match range.and_then(part) {
        None => answer(StatusCode::OK, "text/plain", OBJECT),
        Some((first, last)) => {
            let mut response = answer(StatusCode::PARTIAL_CONTENT, "text/plain", &OBJECT[first..=last]);
            if let Ok(range) = HeaderValue::from_str(&format!("bytes {first}-{last}/{}", OBJECT.len())) {
                response.headers_mut().insert(header::CONTENT_RANGE, range);
            }
            response
        }
    };
    let headers = response.headers_mut();
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(header::ETAG, HeaderValue::from_static(ETAG));
    headers.insert(header::LAST_MODIFIED, HeaderValue::from_static(MODIFIED));
    response
}

/// The first and the last byte that `bytes=first-last` means here.
fn part(range: &str) -> Option<(usize, usize)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let end = OBJECT.len() - 1;
    let first = first.parse().ok().filter(|first| *first <= end)?;
    let last = if last.is_empty() { end } else { last.parse::<usize>().ok()?.min(end) };
    (first <= last).then_some((first, last))
}

fn list(prefix: &str) -> String {
    let found = KEY.starts_with(prefix);
    let contents = format!(
        "<Contents><Key>{KEY}</Key><LastModified>2025-01-01T00:00:00.000Z</LastModified>\
         <ETag>&quot;9b2cf535f27731c974343645a3985328&quot;</ETag><Size>{}</Size>\
         <StorageClass>STANDARD</StorageClass></Contents>",
        OBJECT.len()
    );
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<ListBucketResult xmlns=\"{NAMESPACE}\"><Name>{BUCKET}</Name>\
         <Prefix></Prefix><KeyCount>{}</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{}\
         </ListBucketResult>",
        u8::from(found),
        if found { contents.as_str() } else { "" },
    )
}

fn location() -> String {
    let region = crate::agent::REGION;
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<LocationConstraint xmlns=\"{NAMESPACE}\">{region}</LocationConstraint>"
    )
}

/// S3 has other names than STS for the same errors.
fn refused(refusal: &Refusal) -> Response<Body> {
    let code = match refusal.code.as_str() {
        "MissingAuthenticationToken" => "AccessDenied",
        "InvalidClientTokenId" => "InvalidAccessKeyId",
        code => code,
    };
    error(StatusCode::FORBIDDEN, code, &refusal.message)
}

fn error(status: StatusCode, code: &str, message: &str) -> Response<Body> {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{message}</Message>\
         <RequestId>4442587FB7D0A2F9</RequestId></Error>"
    );
    answer(status, XML, body)
}
