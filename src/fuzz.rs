//! Fuzz targets: for each kind of untrusted input a function that checks invariants which hold for every input. `fuzz/`
//! runs them with libFuzzer; `replay` runs them with the corpora and seeded mutations, so that the two cannot drift
//! apart. In tests and fuzzing builds only.

pub mod annotations;
pub mod arn;
pub mod claims;
mod framing;
pub mod imds_token;
pub mod json_filter;
pub mod records;
pub mod request;
pub mod route;
pub mod sts;
pub mod workloads;

#[cfg(test)]
mod replay;

/// Name of a target and of its corpus, and the function that checks a sample.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: [Target; 10] = [
    ("annotations", annotations::check),
    ("arn", arn::check),
    ("claims", claims::check),
    ("imds_token", imds_token::check),
    ("json_filter", json_filter::check),
    ("records", records::check),
    ("request", request::check),
    ("route", route::check),
    ("sts", sts::check),
    ("workloads", workloads::check),
];

/// Asserts that a text with untrusted parts is safe to log: no control character can start another line.
fn assert_one_line(text: &str) {
    assert!(!text.contains(char::is_control), "{text:?}");
}
