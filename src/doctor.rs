//! `kirsa doctor`: what stands between this node's pods and their credentials, each finding with its fix.
//!
//! Wiring, like [`crate::node`]: it looks at the world from the agent's place, with its configuration and its rights,
//! and through its stages where they can say what is wrong. It changes nothing; what it sends are a request to its own
//! agent, reviews and a TokenRequest to the API server, and to STS a token that must be refused and one that must not.

mod agent;
mod bridge;
mod clock;
mod cluster;
mod disk;
mod fence;
mod finding;
mod http;
mod listeners;
mod listing;
mod others;
mod privileges;
mod health;
mod redirect;
mod report;
mod rights;
mod routes;
mod rules;
mod ruleset;
mod sample;
mod sts;

pub use health::main as health;
pub use listeners::pod_identity_agent;

use std::process::ExitCode;

use crate::{
    config::{Config, DoctorOptions, Source},
    exchange::sts::Sts,
    observe::Metrics,
};
use finding::{Finding, Verdict};
use ruleset::Ruleset;

/// Looks, says what was found, and ends with 1 if something failed.
pub fn main(config: &Config, options: DoctorOptions) -> ExitCode {
    let examined = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(examine(config, options))
    };
    match examined() {
        Ok(findings) if report::print(&findings, options.output) == Verdict::Failed => ExitCode::FAILURE,
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// From the pod's side of the agent to the far one.
async fn examine(config: &Config, options: DoctorOptions) -> anyhow::Result<Vec<Finding>> {
    let metrics = Metrics::new(env!("CARGO_PKG_VERSION"))?;
    let mut findings = agent::check(config.admin_address).await;
    findings.push(privileges::check(config.intercept, config.port));
    findings.push(privileges::check_port(config.port));
    findings.extend(redirect::check(config).await);
    let rules = Ruleset::read();
    findings.extend(rules::check(config, &rules));
    findings.extend(fence::check(config));
    findings.extend(others::check(config, &rules));
    findings.extend(routes::check(config));
    findings.push(bridge::check(config));
    findings.push(hop_limit());
    findings.push(disk::state_dir(&config.state_dir));

    let pods = match &config.source {
        Source::File(path) => {
            let reason = "--workloads: no Kubernetes is asked";
            findings.push(Finding::skipped("api-server", reason));
            sample::of_file(path, config, metrics.clone()).await.map(Some)
        }
        Source::Kubernetes { node_name, kubeconfig, mint, cni_results, startup_taint } => {
            findings.push(disk::cni_records(cni_results.as_deref()));
            let parts =
                rights::Parts { taint: startup_taint.is_some(), container: config.container_audience.is_some() };
            let (found, cluster) = cluster::check(node_name, kubeconfig.as_deref(), *mint, parts).await;
            findings.extend(found);
            match cluster.filter(|cluster| cluster.identity.is_some()) {
                Some(cluster) => sample::of_cluster(&cluster, node_name, config, metrics.clone()).await.map(Some),
                None => Ok(None),
            }
        }
    };
    let sts = Sts::new(config.sts.region.clone(), config.sts.endpoint.clone(), metrics);
    let (found, reached) = sts::check(&config.sts, &sts).await;
    findings.extend(found);
    match pods {
        Ok(Some(pods)) => {
            let sts = (reached && options.exchange).then_some(&sts);
            findings.extend(pods.findings.iter().cloned());
            findings.extend(pods.check(config, sts).await);
        }
        Ok(None) => findings.push(Finding::skipped("token", "no token can be minted: see the checks above")),
        Err(error) => {
            let fix = "correct what is named: the agent cannot serve pods that it cannot read";
            findings.push(Finding::failed("pods", format!("{error:#}"), fix));
        }
    }
    Ok(findings)
}

/// No process of the node can see it: its own packets leave with it, and the answer does not tell.
fn hop_limit() -> Finding {
    let detail = "the hop limit of the instance's metadata service cannot be seen from the node";
    let fix = "set HttpPutResponseHopLimit=1 and HttpTokens=required (aws ec2 modify-instance-metadata-options): then \
               what leads around the redirect gets no session token";
    Finding::skipped("hop-limit", detail).with_fix(fix)
}
