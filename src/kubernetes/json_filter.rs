//! Drops, while an answer of the API server arrives, the members that the agent does not read. Pods and service
//! accounts carry up to 256 KiB of annotations and as much of `managedFields`: neither may reach the agent's memory.
//!
//! A push parser: it keeps the member or token that it is in, with a bound, and passes on reduced JSON.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use http::{Request, Response, header::CONTENT_LENGTH};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use kube::client::Body;
use serde::de::IgnoredAny;
use tower::{BoxError, Layer, Service};

/// Returns the maximum length of an annotation's value; `None` for one that is not read.
pub type Keep = Arc<dyn Fn(&str) -> Option<usize> + Send + Sync>;

/// Marks the end of a streamed list; kube's watcher reads it.
const LIST_END: &str = "k8s.io/initial-events-end";
/// Maximum length of a value that is no annotation: a name has 253, a continue token a few hundred.
const VALUE: usize = 4_096;
/// Maximum length of a name as it is written; none that is read comes near it.
const NAME: usize = 2_048;
/// Maximum length of a number.
const SCALAR: usize = 512;
/// serde_json's own limit.
const DEPTH: usize = 127;
/// Maximum bytes of JSON per byte of a string: `\u0001`.
const ESCAPED: usize = 6;

/// Where in a document the parser is, and so which members are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// An object, a list, a status or a watch event.
    Object,
    Metadata,
    Annotations,
    Spec,
    Status,
    Objects,
    Addresses,
    Address,
    /// A scalar whose string has at most that length.
    Value(usize),
    Skipped,
}

impl Place {
    fn member(self, name: &str, keep: &Keep) -> Self {
        match (self, name) {
            (Self::Object, "type" | "kind" | "apiVersion" | "message" | "reason" | "code") => Self::Value(VALUE),
            (Self::Object, "metadata") => Self::Metadata,
            (Self::Object, "object") => Self::Object,
            (Self::Object, "items") => Self::Objects,
            (Self::Object, "spec") => Self::Spec,
            (Self::Object, "status") => Self::Status,
            (Self::Metadata, "name" | "namespace" | "uid" | "resourceVersion" | "creationTimestamp" | "continue")
            | (Self::Spec, "serviceAccountName" | "hostNetwork")
            | (Self::Status, "phase" | "podIP")
            | (Self::Address, "ip")
            | (Self::Annotations, LIST_END) => Self::Value(VALUE),
            (Self::Metadata, "annotations") => Self::Annotations,
            (Self::Status, "podIPs") => Self::Addresses,
            (Self::Annotations, name) => keep(name).map_or(Self::Skipped, Self::Value),
            _ => Self::Skipped,
        }
    }

    fn longest(self) -> usize {
        if let Self::Value(max) = self { max } else { VALUE }
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
    place: Place,
    /// A member or element was passed on.
    filled: bool,
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

/// The answer is no JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken;

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the API server's answer is not JSON")
    }
}

impl std::error::Error for Broken {}

pub struct Filter {
    keep: Keep,
    levels: Vec<Level>,
    state: State,
    place: Place,
    escaped: bool,
    token: Vec<u8>,
    too_long: bool,
}

impl Filter {
    pub fn new(keep: Keep) -> Self {
        let (levels, token) = (Vec::new(), Vec::new());
        Self { keep, levels, state: State::Value, place: Place::Object, escaped: false, token, too_long: false }
    }

    /// Takes the next bytes, and appends what is left of them.
    ///
    /// # Errors
    /// `Broken`: this is no JSON. What was appended before is good.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), Broken> {
        bytes.iter().try_for_each(|byte| self.byte(*byte, out))
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn held(&self) -> usize {
        self.token.len()
    }

    fn byte(&mut self, byte: u8, out: &mut Vec<u8>) -> Result<(), Broken> {
        match self.state {
            State::InName | State::InString => return self.string(byte, out),
            State::InScalar if !b",]} \n\r\t".contains(&byte) => return self.note(byte, SCALAR),
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
                let level = self.levels.last().ok_or(Broken)?;
                self.state = if level.object { State::Name } else { State::Value };
                self.place = level.place.element();
            }
            (State::Comma, _) if self.levels.is_empty() => {
                // The next event of a watch.
                (self.state, self.place) = (State::Value, Place::Object);
                self.value(byte, out)?;
            }
            (State::Value | State::First, _) => self.value(byte, out)?,
            _ => return Err(Broken),
        }
        Ok(())
    }

    fn begin(&mut self, state: State) {
        self.token.clear();
        (self.state, self.escaped, self.too_long) = (state, false, false);
    }

    fn value(&mut self, byte: u8, out: &mut Vec<u8>) -> Result<(), Broken> {
        match byte {
            b'{' | b'[' => return self.open(byte, out),
            b'"' => self.begin(State::InString),
            b'-' | b'0'..=b'9' | b't' | b'f' | b'n' => {
                self.begin(State::InScalar);
                self.token.push(byte);
            }
            _ => return Err(Broken),
        }
        Ok(())
    }

    fn open(&mut self, byte: u8, out: &mut Vec<u8>) -> Result<(), Broken> {
        if self.levels.len() >= DEPTH {
            return Err(Broken);
        }
        let object = byte == b'{';
        if matches!(self.place, Place::Value(_)) {
            // An error of its type for the decoder.
            self.separate(out);
            out.extend_from_slice(b"{}");
            self.place = Place::Skipped;
        }
        if self.place != Place::Skipped {
            self.separate(out);
            out.push(byte);
        }
        self.levels.push(Level { object, place: self.place, filled: false });
        self.state = if object { State::FirstName } else { State::First };
        self.place = self.place.element();
        Ok(())
    }

    fn close(&mut self, byte: u8, out: &mut Vec<u8>) -> Result<(), Broken> {
        let level = self.levels.pop().filter(|level| level.object == (byte == b'}')).ok_or(Broken)?;
        if level.place != Place::Skipped {
            out.push(byte);
        }
        self.state = State::Comma;
        Ok(())
    }

    /// Elements of a list are separated here, members with their names.
    fn separate(&mut self, out: &mut Vec<u8>) {
        if let Some(level) = self.levels.last_mut().filter(|level| !level.object) {
            if level.filled {
                out.push(b',');
            }
            level.filled = true;
        }
    }

    fn note(&mut self, byte: u8, max: usize) -> Result<(), Broken> {
        if self.token.len() >= max {
            return Err(Broken);
        }
        self.token.push(byte);
        Ok(())
    }

    fn string(&mut self, byte: u8, out: &mut Vec<u8>) -> Result<(), Broken> {
        if byte < b' ' {
            return Err(Broken);
        }
        if byte == b'"' && !self.escaped {
            return if self.state == State::InName { self.end_name(out) } else { self.end_string(out) };
        }
        self.escaped = byte == b'\\' && !self.escaped;
        let max = match (self.state, self.place) {
            (State::InName, _) => NAME,
            (_, Place::Skipped) => 0,
            (_, place) => place.longest() * ESCAPED,
        };
        if self.token.len() < max {
            self.token.push(byte);
        } else {
            self.too_long = true;
        }
        Ok(())
    }

    fn text(&mut self) -> Result<String, Broken> {
        self.token.insert(0, b'"');
        self.token.push(b'"');
        serde_json::from_slice(&self.token).map_err(|_| Broken)
    }

    fn end_name(&mut self, out: &mut Vec<u8>) -> Result<(), Broken> {
        let parent = self.levels.last().ok_or(Broken)?.place;
        self.state = State::Colon;
        self.place = Place::Skipped;
        if parent == Place::Skipped || self.too_long {
            return Ok(());
        }
        let name = self.text()?;
        self.place = parent.member(&name, &self.keep);
        if let Some(level) = self.levels.last_mut().filter(|_| self.place != Place::Skipped) {
            if level.filled {
                out.push(b',');
            }
            level.filled = true;
            serde_json::to_writer(&mut *out, &name).map_err(|_| Broken)?;
            out.push(b':');
        }
        Ok(())
    }

    fn end_string(&mut self, out: &mut Vec<u8>) -> Result<(), Broken> {
        self.state = State::Comma;
        if self.place == Place::Skipped {
            return Ok(());
        }
        let max = self.place.longest();
        let text = if self.too_long { None } else { Some(self.text()?) };
        self.separate(out);
        // Too long stays too long, at the least length that is.
        let text = text.filter(|text| text.len() <= max).unwrap_or_else(|| "x".repeat(max + 1));
        serde_json::to_writer(out, &text).map_err(|_| Broken)
    }

    fn end_scalar(&mut self, out: &mut Vec<u8>) -> Result<(), Broken> {
        serde_json::from_slice::<IgnoredAny>(&self.token).map_err(|_| Broken)?;
        if self.place != Place::Skipped {
            self.separate(out);
            out.extend_from_slice(&self.token);
        }
        self.state = State::Comma;
        Ok(())
    }
}

impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filter").finish_non_exhaustive()
    }
}

/// Filters the answers of a client that only reads.
#[derive(Clone)]
pub(super) struct Slim<S> {
    inner: S,
    keep: Keep,
}

#[derive(Clone)]
pub(super) struct SlimLayer(pub(super) Keep);

impl<S> Layer<S> for SlimLayer {
    type Service = Slim<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Slim { inner, keep: self.0.clone() }
    }
}

type Frames = Pin<Box<dyn Stream<Item = Result<Frame<Bytes>, BoxError>> + Send>>;

impl<S, B> Service<Request<Body>> for Slim<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<StreamBody<Frames>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let keep = self.keep.clone();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let (mut parts, body) = answer.await?.into_parts();
            let bytes = body.into_data_stream().map_err(Into::into);
            let frames: Frames = if parts.status.is_success() {
                parts.headers.remove(CONTENT_LENGTH);
                let mut filter = Filter::new(keep);
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
#[path = "slim_tests.rs"]
mod tests;
