//! What others write and kirsa reads: one entry for each kind of input, with what must hold whatever it is. `fuzz/`
//! feeds them with what libFuzzer comes up with, the test below with the corpora and with seeded mutations of those, so
//! the two cannot drift apart. In tests and fuzzing builds only.

pub mod annotations;
pub mod answer;
pub mod arn;
pub mod claims;
mod framing;
pub mod records;
pub mod request;
pub mod route;
pub mod session;
pub mod sts;
pub mod workloads;

#[cfg(test)]
mod replay;

/// One kind of input: its name, which is that of its corpus too, and what to do with a sample.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: [Target; 10] = [
    ("annotations", annotations::check),
    ("answer", answer::check),
    ("arn", arn::check),
    ("claims", claims::check),
    ("records", records::check),
    ("request", request::check),
    ("route", route::check),
    ("session", session::check),
    ("sts", sts::check),
    ("workloads", workloads::check),
];

/// What a log line may hold of a value that somebody else wrote: no control character starts another line.
fn is_one_line(text: &str) {
    assert!(!text.contains(char::is_control), "{text:?}");
}
