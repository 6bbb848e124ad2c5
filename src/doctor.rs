//! `kirsa doctor`: finds what keeps this node's pods from their credentials, with a fix for each problem.
//!
//! Wiring, like [`crate::agent`]: the checks run with the agent's configuration and permissions, and through the
//! agent's stages where possible. They change nothing. They send requests to the running agent, access reviews and a
//! TokenRequest to the API server, and two tokens to STS: an invalid one, which it must reject, and a real one.

mod agent;
mod bridge;
mod clock;
mod cluster;
mod disk;
mod fence;
mod finding;
mod http;
mod listeners;
mod json_stream;
mod conflicts;
mod privileges;
mod health;
mod redirect;
mod report;
mod rbac;
mod routes;
mod rules;
mod ruleset;
mod exchange;
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

/// Runs all checks and prints the findings. Exits 1 if a check failed.
pub fn main(config: &Config, options: DoctorOptions) -> ExitCode {
    let findings = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(run_checks(config, options))
    };
    match findings() {
        Ok(findings) if report::print(&findings, options.output) == Verdict::Failed => ExitCode::FAILURE,
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the checks in the order of a request: from the agent and the redirect to the API server and STS.
async fn run_checks(config: &Config, options: DoctorOptions) -> anyhow::Result<Vec<Finding>> {
    let metrics = Metrics::new(env!("CARGO_PKG_VERSION"))?;
    let mut findings = agent::check(config.admin_address).await;
    findings.push(privileges::check(config.intercept, config.port));
    findings.push(privileges::check_port(config.port));
    findings.extend(redirect::check(config).await);
    let rules = Ruleset::read();
    findings.extend(rules::check(config, &rules));
    findings.extend(fence::check(config));
    findings.extend(conflicts::check(config, &rules));
    findings.extend(routes::check(config));
    findings.push(bridge::check(config));
    findings.push(hop_limit());
    findings.push(disk::state_dir(&config.state_dir));

    let pods = match &config.source {
        Source::File(path) => {
            let reason = "--workloads is set, so the agent does not use the API server";
            findings.push(Finding::skipped("api-server", reason));
            exchange::pods_from_file(path, config, metrics.clone()).await.map(Some)
        }
        Source::Kubernetes { node_name, kubeconfig, mint, cni_results, startup_taint } => {
            findings.push(disk::cni_records(cni_results.as_deref()));
            let components = rbac::Components {
                startup_taint: startup_taint.is_some(),
                container_credentials: config.container_audience.is_some(),
            };
            let (found, cluster) = cluster::check(node_name, kubeconfig.as_deref(), *mint, components).await;
            findings.extend(found);
            match cluster.filter(|cluster| cluster.identity.is_some()) {
                Some(cluster) => {
                    exchange::pods_from_cluster(&cluster, node_name, config, metrics.clone()).await.map(Some)
                }
                None => Ok(None),
            }
        }
    };
    let sts = Sts::new(config.sts.region.clone(), config.sts.endpoint.clone(), metrics);
    let (found, is_reachable) = sts::check(&config.sts, &sts).await;
    findings.extend(found);
    match pods {
        Ok(Some(pods)) => {
            let sts = (is_reachable && options.exchange).then_some(&sts);
            findings.extend(pods.findings.iter().cloned());
            findings.extend(pods.check(config, sts).await);
        }
        Ok(None) => findings.push(Finding::skipped("token", "the agent cannot mint tokens: see the checks above")),
        Err(error) => {
            let fix = "fix this error: the agent cannot serve pods that it cannot read";
            findings.push(Finding::failed("pods", format!("{error:#}"), fix));
        }
    }
    Ok(findings)
}

/// Reminds the operator of the hop limit, which no process on the node can observe.
fn hop_limit() -> Finding {
    let detail = "the hop limit of the instance's metadata service cannot be checked from the node";
    let fix = "set HttpPutResponseHopLimit=1 and HttpTokens=required (aws ec2 modify-instance-metadata-options), so \
               that requests that bypass the redirect get no IMDS token";
    Finding::skipped("hop-limit", detail).with_fix(fix)
}
