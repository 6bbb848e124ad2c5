//! `kirsa health`: liveness and readiness of this container's agent. The admin port cannot answer that: during a hot
//! restart two agents share the node's network, and the one that holds the port would answer the probes of both.

use std::{path::Path, process::ExitCode};

use anyhow::Context;
use http::StatusCode;
use tokio::net::UnixStream;

use super::http::get_with_host;
use crate::config::Health;

fn path(health: Health) -> &'static str {
    match health {
        Health::Live => "/healthz",
        Health::Ready => "/readyz",
    }
}

/// Prints the agent's answer. Exits 1 unless the agent is healthy.
pub fn main(socket: &Path, health: Health) -> ExitCode {
    let query = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(query(socket, health))
    };
    match query() {
        Ok((status, body)) => {
            print!("{body}");
            if status.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn query(socket: &Path, health: Health) -> anyhow::Result<(StatusCode, String)> {
    let context = || format!("--admin-socket {}: no agent answers there", socket.display());
    let stream = UnixStream::connect(socket).await.with_context(context)?;
    let response = get_with_host(stream, "localhost".into(), path(health)).await.with_context(context)?;
    Ok((response.status(), String::from_utf8_lossy(response.body()).into_owned()))
}
