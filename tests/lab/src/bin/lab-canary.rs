//! The canary as a process of its own: stands in for the metadata service of a node, and tells who asked it.
//!
//! Says on standard output, in one line of JSON, where it can be asked: `GET /hits`.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
};

use anyhow::Context as _;
use clap::Parser;
use lab::imds::{Canary, Instance};
use serde_json::{Value, json};

#[derive(Parser)]
struct Args {
    /// The metadata address, or both of them.
    #[arg(long, required = true)]
    listen: Vec<String>,
    /// Where the hits can be read.
    #[arg(long, default_value = "127.0.0.1:0")]
    control: String,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut canaries = Vec::new();
    for address in &args.listen {
        let listener = TcpListener::bind(address).with_context(|| format!("--listen {address}"))?;
        canaries.push(Canary::start(listener, Instance::default())?);
    }
    let control = TcpListener::bind(&args.control).context("--control")?;
    println!("{}", json!({ "control": control.local_addr()? }));
    for stream in control.incoming() {
        // A caller that went away is the caller's own affair.
        let _ = tell(stream?, &canaries);
    }
    Ok(())
}

/// Every request has the same answer.
fn tell(stream: TcpStream, canaries: &[Canary]) -> anyhow::Result<()> {
    for line in BufReader::new(&stream).lines() {
        if line?.is_empty() {
            break;
        }
    }
    let hits: Vec<Value> = canaries
        .iter()
        .flat_map(Canary::hits)
        .map(|hit| json!({ "from": hit.from, "method": hit.method, "path": hit.path }))
        .collect();
    let body = serde_json::to_vec(&hits)?;
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    (&stream).write_all(head.as_bytes())?;
    (&stream).write_all(&body)?;
    Ok(())
}
