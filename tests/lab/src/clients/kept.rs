//! What a program asks for that goes on with one client object.

use std::{net::TcpListener, path::Path};

use anyhow::{Result, ensure};

use super::{
    client::Client,
    run::{End, Running},
};
use crate::{namespace::BASE, site::Site};

/// In one process. A program that is one call makes several requests in it, and looks at its credentials for each.
const CALLS: usize = 3;

/// What came of a few calls in a row.
#[derive(Debug)]
pub struct Kept {
    pub signed_requests: usize,
    /// Of credentials, to the agent, whatever its answer was.
    pub fetches: f64,
}

/// `agent` is the binary of the agent.
pub fn kept(client: &Client, agent: &Path) -> Result<Kept> {
    let site = Site::new(agent)?;
    let store = site.sts.start_store(TcpListener::bind((BASE, 0))?)?;
    let pod = site.pod_with_role("keeper")?;
    let agent = site.start()?;
    let (sts, store) = (site.sts.url(), store.url());
    let mut running = Running::start(client, &pod, &sts, &store)?;
    let mut calls = vec![running.call()?];
    while client.talks() && calls.len() < CALLS {
        calls.push(running.go_on()?);
    }
    ensure!(calls.iter().all(|call| matches!(call.end, End::Succeeded)), "{calls:?}");
    let fetches = agent.metric("kirsa_requests_total", &[("route", "credentials")])?;
    agent.stop()?;
    Ok(Kept { signed_requests: site.sts.acts().len(), fetches })
}
