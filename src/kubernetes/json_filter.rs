//! Streaming filter for responses of the API server: drops the members that the agent does not read. Pods and service
//! accounts have up to 256 KiB of annotations and as much of `managedFields`, which must not reach the agent's memory.
//!
//! The filter is a push parser. It buffers only the current token, up to a limit, and emits reduced JSON.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, future::BoxFuture, stream::BoxStream};
use http::{Request, Response, header::CONTENT_LENGTH};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use kube::client::Body;
use serde::de::IgnoredAny;
use tower::{BoxError, Layer, Service};

/// Returns the maximum length of an annotation's value; `None` for an annotation that is dropped.
pub type AnnotationFilter = Arc<dyn Fn(&str) -> Option<usize> + Send + Sync>;

/// Annotation that marks the end of a streamed list. kube's watcher reads it.
const LIST_END: &str = "k8s.io/initial-events-end";
/// Maximum length of a string other than an annotation: a name has 253 bytes, a continue token a few hundred.
const MAX_VALUE_LEN: usize = 4_096;
/// Maximum length of a member's name, with escapes.
const MAX_NAME_LEN: usize = 2_048;
/// Maximum length of a number.
const MAX_SCALAR_LEN: usize = 512;
/// Maximum depth, as in serde_json.
const MAX_DEPTH: usize = 127;
/// Maximum length of an escaped byte: `\u0001`.
const MAX_ESCAPE_LEN: usize = 6;

/// Position in a document. It decides which members are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Position {
    /// An object, a list, a status or a watch event.
    Object,
    Metadata,
    Annotations,
    Spec,
    Status,
    Objects,
    Addresses,
    Address,
    /// A scalar; a string has at most that length.
    Value(usize),
    Skipped,
}

impl Position {
    fn member(self, name: &str, keep: &AnnotationFilter) -> Self {
        match (self, name) {
            (Self::Object, "type" | "kind" | "apiVersion" | "message" | "reason" | "code") => {
                Self::Value(MAX_VALUE_LEN)
            }
            (Self::Object, "metadata") => Self::Metadata,
            (Self::Object, "object") => Self::Object,
            (Self::Object, "items") => Self::Objects,
            (Self::Object, "spec") => Self::Spec,
            (Self::Object, "status") => Self::Status,
            (Self::Metadata, "name" | "namespace" | "uid" | "resourceVersion" | "creationTimestamp" | "continue")
            | (Self::Spec, "serviceAccountName" | "hostNetwork")
            | (Self::Status, "phase" | "podIP")
            | (Self::Address, "ip")
            | (Self::Annotations, LIST_END) => Self::Value(MAX_VALUE_LEN),
            (Self::Metadata, "annotations") => Self::Annotations,
            (Self::Status, "podIPs") => Self::Addresses,
            (Self::Annotations, name) => keep(name).map_or(Self::Skipped, Self::Value),
            _ => Self::Skipped,
        }
    }

    fn max_len(self) -> usize {
        if let Self::Value(max) = self { max } else { MAX_VALUE_LEN }
    }

    fn element(self) -> Self {
        match self {
            Self::Objects => Self::Object,
            Self::Addresses => Self::Address,
            _ => Self::Skipped,
        }
    }
}

#[derive(Debug)]
struct Level {
    object: bool,
    position: Position,
    /// At least one member or element has been emitted.
    has_output: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// A value, or the end of an empty list.
    First,
    Value,
    /// A name, or the end of an empty object.
    FirstName,
    Name,
    Colon,
    Comma,
    InName,
    InString,
    InScalar,
}

/// The response is not JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidJson;

impl fmt::Display for InvalidJson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the API server's response is not JSON")
    }
}

impl std::error::Error for InvalidJson {}

/// Push parser that reduces a JSON document, or a sequence of watch events.
pub struct JsonFilter {
    keep: AnnotationFilter,
    levels: Vec<Level>,
    state: State,
    position: Position,
    escaped: bool,
    token: Vec<u8>,
    too_long: bool,
}

impl JsonFilter {
    pub fn new(keep: AnnotationFilter) -> Self {
        let (levels, token) = (Vec::new(), Vec::new());
        Self { keep, levels, state: State::Value, position: Position::Object, escaped: false, token, too_long: false }
    }

    /// Filters the next bytes and appends the result to `out`.
    ///
    /// # Errors
    /// `InvalidJson` if the input is not JSON. What was appended before is valid.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), InvalidJson> {
        bytes.iter().try_for_each(|byte| self.push_byte(*byte, out))
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn buffered(&self) -> usize {
        self.token.len()
    }

    fn push_byte(&mut self, byte: u8, out: &mut Vec<u8>) -> Result<(), InvalidJson> {
        match self.state {
            State::InName | State::InString => return self.string(byte, out),
            State::InScalar if !b",]} \n\r\t".contains(&byte) => return self.push_bounded(byte, MAX_SCALAR_LEN),
            State::InScalar => self.end_scalar(out)?,
            _ => {}
        }
        match (self.state, byte) {
            (State::Comma | State::Value, b'\n') if self.levels.is_empty() => out.push(byte),
            (_, b' ' | b'\n' | b'\r' | b'\t') => {}
            (State::Name | State::FirstName, b'"') => self.begin(State::InName),
            (State::FirstName, b'}') | (State::First, b']') => self.close(byte, out)?,
            (State::Comma, b'}' | b']') => self.close(byte, out)?,
            (State::Colon, b':') => self.state = State::Value,
            (State::Comma, b',') => {
                let level = self.levels.last().ok_or(InvalidJson)?;
                self.state = if level.object { State::Name } else { State::Value };
                self.position = level.position.element();
            }
            (State::Comma, _) if self.levels.is_empty() => {
                // The next event of a watch starts.
                (self.state, self.position) = (State::Value, Position::Object);
                self.value(byte, out)?;
            }
            (State::Value | State::First, _) => self.value(byte, out)?,
            _ => return Err(InvalidJson),
        }
        Ok(())
    }

    fn begin(&mut self, state: State) {
        self.token.clear();
        (self.state, self.escaped, self.too_long) = (state, false, false);
    }

    fn value(&mut self, byte: u8, out: &mut Vec<u8>) -> Result<(), InvalidJson> {
        match byte {
            b'{' | b'[' => return self.open(byte, out),
            b'"' => self.begin(State::InString),
            b'-' | b'0'..=b'9' | b't' | b'f' | b'n' => {
                self.begin(State::InScalar);
                self.token.push(byte);
            }
            _ => return Err(InvalidJson),
        }
        Ok(())
    }

    fn open(&mut self, byte: u8, out: &mut Vec<u8>) -> Result<(), InvalidJson> {
        if self.levels.len() >= MAX_DEPTH {
            return Err(InvalidJson);
        }
        let object = byte == b'{';
        if matches!(self.position, Position::Value(_)) {
            // Where a scalar belongs, an empty object makes the decoder fail.
            self.separate(out);
            out.extend_from_slice(b"{}");
            self.position = Position::Skipped;
        }
        if self.position != Position::Skipped {
            self.separate(out);
            out.push(byte);
        }
        self.levels.push(Level { object, position: self.position, has_output: false });
        self.state = if object { State::FirstName } else { State::First };
        self.position = self.position.element();
        Ok(())
    }

    fn close(&mut self, byte: u8, out: &mut Vec<u8>) -> Result<(), InvalidJson> {
        let level = self.levels.pop().filter(|level| level.object == (byte == b'}')).ok_or(InvalidJson)?;
        if level.position != Position::Skipped {
            out.push(byte);
        }
        self.state = State::Comma;
        Ok(())
    }

    /// Writes the comma before an element of a list. Members get theirs with their names.
    fn separate(&mut self, out: &mut Vec<u8>) {
        if let Some(level) = self.levels.last_mut().filter(|level| !level.object) {
            if level.has_output {
                out.push(b',');
            }
            level.has_output = true;
        }
    }

    fn push_bounded(&mut self, byte: u8, max: usize) -> Result<(), InvalidJson> {
        if self.token.len() >= max {
            return Err(InvalidJson);
        }
        self.token.push(byte);
        Ok(())
    }

    fn string(&mut self, byte: u8, out: &mut Vec<u8>) -> Result<(), InvalidJson> {
        if byte < b' ' {
            return Err(InvalidJson);
        }
        if byte == b'"' && !self.escaped {
            return if self.state == State::InName { self.end_name(out) } else { self.end_string(out) };
        }
        self.escaped = byte == b'\\' && !self.escaped;
        let max = match (self.state, self.position) {
            (State::InName, _) => MAX_NAME_LEN,
            (_, Position::Skipped) => 0,
            (_, position) => position.max_len() * MAX_ESCAPE_LEN,
        };
        if self.token.len() < max {
            self.token.push(byte);
        } else {
            self.too_long = true;
        }
        Ok(())
    }

    fn decode_string(&mut self) -> Result<String, InvalidJson> {
        self.token.insert(0, b'"');
        self.token.push(b'"');
        serde_json::from_slice(&self.token).map_err(|_| InvalidJson)
    }

    fn end_name(&mut self, out: &mut Vec<u8>) -> Result<(), InvalidJson> {
        let parent = self.levels.last().ok_or(InvalidJson)?.position;
        self.state = State::Colon;
        self.position = Position::Skipped;
        if parent == Position::Skipped || self.too_long {
            return Ok(());
        }
        let name = self.decode_string()?;
        self.position = parent.member(&name, &self.keep);
        if let Some(level) = self.levels.last_mut().filter(|_| self.position != Position::Skipped) {
            if level.has_output {
                out.push(b',');
            }
            level.has_output = true;
            serde_json::to_writer(&mut *out, &name).map_err(|_| InvalidJson)?;
            out.push(b':');
        }
        Ok(())
    }

    fn end_string(&mut self, out: &mut Vec<u8>) -> Result<(), InvalidJson> {
        self.state = State::Comma;
        if self.position == Position::Skipped {
            return Ok(());
        }
        let max = self.position.max_len();
        let text = if self.too_long { None } else { Some(self.decode_string()?) };
        self.separate(out);
        // A value that is too long is replaced by the shortest one that is too long, so that it is still refused.
        let text = text.filter(|text| text.len() <= max).unwrap_or_else(|| "x".repeat(max + 1));
        serde_json::to_writer(out, &text).map_err(|_| InvalidJson)
    }

    fn end_scalar(&mut self, out: &mut Vec<u8>) -> Result<(), InvalidJson> {
        serde_json::from_slice::<IgnoredAny>(&self.token).map_err(|_| InvalidJson)?;
        if self.position != Position::Skipped {
            self.separate(out);
            out.extend_from_slice(&self.token);
        }
        self.state = State::Comma;
        Ok(())
    }
}

impl fmt::Debug for JsonFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JsonFilter").finish_non_exhaustive()
    }
}

/// Filters the responses of a client that only reads.
#[derive(Clone)]
pub(super) struct FilterService<S> {
    inner: S,
    keep: AnnotationFilter,
}

#[derive(Clone)]
pub(super) struct FilterLayer(pub(super) AnnotationFilter);

impl<S> Layer<S> for FilterLayer {
    type Service = FilterService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        FilterService { inner, keep: self.0.clone() }
    }
}

type Frames = BoxStream<'static, Result<Frame<Bytes>, BoxError>>;

impl<S, B> Service<Request<Body>> for FilterService<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<StreamBody<Frames>>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let keep = self.keep.clone();
        let response = self.inner.call(request);
        Box::pin(async move {
            let (mut parts, body) = response.await?.into_parts();
            let bytes = body.into_data_stream().map_err(Into::into);
            let frames: Frames = if parts.status.is_success() {
                parts.headers.remove(CONTENT_LENGTH);
                let mut filter = JsonFilter::new(keep);
                Box::pin(bytes.map(move |bytes| {
                    let mut out = Vec::new();
                    filter.push(&bytes?, &mut out)?;
                    Ok(Frame::data(out.into()))
                }))
            } else {
                Box::pin(bytes.map_ok(Frame::data))
            };
            Ok(Response::from_parts(parts, StreamBody::new(frames)))
        })
    }
}

#[cfg(test)]
#[path = "json_filter_tests.rs"]
mod tests;
