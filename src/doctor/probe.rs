//! `kirsa probe`: how the agent of this very container is. The admin port cannot say that: while one agent hands over to
//! the next, both are pods of this node's network, and a probe of either is answered by the one that has the port.

use std::{path::Path, process::ExitCode};

use anyhow::Context;
use clap::ValueEnum;
use http::StatusCode;
use tokio::net::UnixStream;

use super::http::get_of;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Health {
    Live,
    Ready,
}

impl Health {
    fn path(self) -> &'static str {
        match self {
            Self::Live => "/healthz",
            Self::Ready => "/readyz",
        }
    }
}

/// Says what the agent says, and ends with 1 if that is not that all is well.
pub fn main(socket: &Path, health: Health) -> ExitCode {
    let asked = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(ask(socket, health))
    };
    match asked() {
        Ok((status, said)) => {
            print!("{said}");
            if status.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn ask(socket: &Path, health: Health) -> anyhow::Result<(StatusCode, String)> {
    let asking = || format!("--admin-socket {}: no agent answers there", socket.display());
    let stream = UnixStream::connect(socket).await.with_context(asking)?;
    let answer = get_of(stream, "localhost".into(), health.path()).await.with_context(asking)?;
    Ok((answer.status(), String::from_utf8_lossy(answer.body()).into_owned()))
}
