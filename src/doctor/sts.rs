//! STS: is it there, does it answer like one, and what time does it have?

use super::{clock, finding::Finding};
use crate::{
    clock::UnixTime,
    config,
    exchange::sts::{Reachability, Sts},
    refusal::Reason,
};

const CHECK: &str = "sts";

/// Also says whether it can be asked for more.
pub(super) async fn check(config: &config::Sts, sts: &Sts) -> (Vec<Finding>, bool) {
    let knock = sts.check_reachable().await;
    let time = clock::check("clock-sts", "STS", knock.server_time, UnixTime::now());
    let whom =
        config.endpoint.as_ref().map_or_else(|| format!("STS of {}", config.region), |url| format!("STS at {url}"));
    let found = judge(&whom, &knock);
    let reached = found.verdict != super::finding::Verdict::Failed;
    let findings = if reached { vec![found, time] } else { vec![found] };
    (findings, reached)
}

fn judge(whom: &str, knock: &Reachability) -> Finding {
    let said = &knock.message;
    match knock.reason {
        Some(Reason::WebIdentityRefused | Reason::AccessDenied | Reason::BadStsRequest) => {
            Finding::ok(CHECK, format!("{whom} refuses a token that is none: {said}"))
        }
        Some(reason @ (Reason::StsThrottled | Reason::IdentityProviderUnreachable)) => {
            Finding::warning(CHECK, format!("{whom} answers: {said}"), reason.info().advice)
        }
        Some(Reason::StsUnavailable | Reason::ExchangeTimeout) => Finding::failed(
            CHECK,
            format!("{whom}: {said}"),
            "check the node's resolver (dnsPolicy: Default), its way to the endpoint (route, proxy, VPC endpoint and its \
             security group, port 443) and the certificate that is shown there",
        ),
        Some(reason) => Finding::failed(CHECK, format!("{whom}: {said}"), reason.info().advice),
        None => Finding::failed(CHECK, format!("{whom}: {said}"), Reason::BadStsResponse.info().advice),
    }
}
