//! Parse, run, exit.

#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used)]

use std::process::ExitCode;

fn main() -> ExitCode {
    match kirsa::config::parse() {
        Ok(command) => kirsa::node::main(command),
        Err(code) => code,
    }
}
