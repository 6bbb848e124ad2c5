//! Checks STS: connectivity, the response to an invalid token, and the clock.

use super::{
    clock,
    finding::{Finding, Verdict},
};
use crate::{
    clock::UnixTime,
    config,
    exchange::sts::{Reachability, Sts},
    refusal::Reason,
};

const CHECK: &str = "sts";

/// Returns the findings, and whether STS is reachable.
pub(super) async fn check(config: &config::Sts, sts: &Sts) -> (Vec<Finding>, bool) {
    let reachability = sts.check_reachable().await;
    let clock = clock::check("clock-sts", "STS", reachability.server_time, UnixTime::now());
    let endpoint =
        config.endpoint.as_ref().map_or_else(|| format!("STS of {}", config.region), |url| format!("STS at {url}"));
    let finding = judge(&endpoint, &reachability);
    let is_reachable = finding.verdict != Verdict::Failed;
    let findings = if is_reachable { vec![finding, clock] } else { vec![finding] };
    (findings, is_reachable)
}

fn judge(endpoint: &str, reachability: &Reachability) -> Finding {
    let message = &reachability.message;
    match reachability.reason {
        Some(Reason::WebIdentityRefused | Reason::AccessDenied | Reason::BadStsRequest) => {
            Finding::ok(CHECK, format!("{endpoint} rejects an invalid token, as expected: {message}"))
        }
        Some(reason @ (Reason::StsThrottled | Reason::IdentityProviderUnreachable)) => {
            Finding::warning(CHECK, format!("{endpoint} responds: {message}"), reason.info().advice)
        }
        Some(Reason::StsUnavailable | Reason::ExchangeTimeout) => Finding::failed(
            CHECK,
            format!("{endpoint}: {message}"),
            "check the node's DNS resolver (dnsPolicy: Default), its connectivity to the endpoint (route, proxy, VPC \
             endpoint and its security group, port 443) and the endpoint's certificate",
        ),
        Some(reason) => Finding::failed(CHECK, format!("{endpoint}: {message}"), reason.info().advice),
        None => Finding::failed(CHECK, format!("{endpoint}: {message}"), Reason::BadStsResponse.info().advice),
    }
}
