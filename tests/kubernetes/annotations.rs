//! Service-account annotations: role, session parameters and their changes.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use lab::agent::field;
use lab::poll::poll;

use crate::outage::ApiServerOutage;
use crate::site::{ROLE_ARN, Site, arn, credentials, list, role, wait_for_metric};
use crate::{TIMEOUT, WATCH_TIMEOUT};

/// This is the first request for the account: only a live lookup is sure to see the annotation.
#[test]
fn added_annotation_applies_to_next_request() -> Result<()> {
    let site = Site::new()?;
    site.annotate("late", &[])?;
    let agent = site.start()?;
    let pod = site.run("late-0", "late")?;
    site.account("late")?;
    site.assert_served(&pod, "late")?;
    agent.stop()
}

/// IMDS-10, IMDS-24: the watch replaces the cached live lookup.
#[test]
fn changed_annotation_applies() -> Result<()> {
    let site = Site::new()?;
    site.annotate("app", &[])?;
    site.trust(&arn("other"), "app");
    let agent = site.start()?;
    let pod = site.run("app-0", "app")?;
    let wait_for = |status, body: &str| {
        let what = format!("{status} {body}");
        poll(&what, WATCH_TIMEOUT, || list(&pod).ok().filter(|list| list.status == status && list.body.contains(body)))
    };
    ensure!(list(&pod)?.status == 404);
    ensure!(credentials(&pod, &role("app"))?.status == 404);

    site.account("app")?;
    wait_for(200, "app-role")?;
    site.assert_served(&pod, "app")?;

    site.annotate("app", &[(ROLE_ARN, &arn("other"))])?;
    wait_for(200, "other-role")?;
    let session = site.session(&credentials(&pod, &role("other"))?)?;
    ensure!(session.role_arn == arn("other") && session.claims.subject == site.subject("app"), "{session:?}");
    ensure!(credentials(&pod, &role("app"))?.status == 404, "the former role is not found");

    site.annotate("app", &[])?;
    wait_for(404, "")?;
    ensure!(credentials(&pod, &role("other"))?.status == 404);
    agent.stop()
}

#[test]
fn malformed_annotation_is_refused_with_fix() -> Result<()> {
    let site = Site::new()?;
    let agent = site.start()?;
    for (account, annotation, value, fix) in [
        ("arn", ROLE_ARN, "app-role", "\"app-role\" must be arn:"),
        ("duration", "kirsa.dev/session-duration", "900", "\"900\" must be a number of seconds from 1800 to 43200"),
    ] {
        let role_arn = arn(account);
        // A duplicate key keeps its last value.
        let annotations = BTreeMap::from([(ROLE_ARN, role_arn.as_str()), (annotation, value)]);
        site.annotate(account, &Vec::from_iter(annotations))?;
        let pod = site.run(account, account)?;
        let (list, document) = (list(&pod)?, credentials(&pod, &role(account))?);
        ensure!(list.status == 403 && document.status == 403, "{list:?} {document:?}");
        let line = agent.wait_for_log(|entry| {
            field(entry, "reason") == Some("bad_annotation") && field(entry, "service_account") == Some(account)
        })?;
        let detail = field(&line, "detail").unwrap_or_default();
        let name = format!("service account {}/{account}", site.namespace());
        ensure!(detail.contains(&name) && detail.contains(annotation) && detail.contains(fix), "{detail}");
        ensure!(field(&line, "pod") == Some(account) && site.calls(account).is_empty(), "{line}");

        site.account(account)?;
        poll("the corrected annotation", WATCH_TIMEOUT, || site.assert_served(&pod, account).ok())?;
    }
    agent.stop()
}

/// IMDS-24
#[test]
fn missing_role_costs_one_live_lookup() -> Result<()> {
    let site = Site::new()?;
    site.annotate("plain", &[])?;
    site.annotate("late", &[])?;
    let agent = site.start()?;
    let (plain, late) = (site.run("plain-0", "plain")?, site.run("late-0", "late")?);
    ensure!(list(&plain)?.status == 404);
    wait_for_metric(&agent, "kirsa_indexed_pods", &[], 3.0)?;
    let outage = ApiServerOutage::start(&site.node)?;
    ensure!(list(&plain)?.status == 404, "a second live lookup was needed");
    // SDKs do not retry "no role", so the agent must not return it without a live lookup.
    let answer = list(&late)?;
    ensure!(answer.status == 503, "{answer:?}");
    agent.wait_for_refusal("account_unavailable")?;
    outage.heal()?;
    poll("404 after the outage", TIMEOUT, || list(&late).ok().filter(|list| list.status == 404))?;
    agent.stop()
}

#[test]
fn annotations_set_sts_parameters() -> Result<()> {
    let site = Site::new()?;
    let policy = r#"{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"s3:*","Resource":"*"}]}"#;
    site.trust(&arn("app"), "app");
    site.annotate(
        "app",
        &[
            (ROLE_ARN, &arn("app")),
            ("kirsa.dev/session-duration", "1800"),
            ("kirsa.dev/session-scope", "pod"),
            ("kirsa.dev/session-policy", policy),
            ("kirsa.dev/session-policy-arns", "arn:aws:iam::aws:policy/ReadOnlyAccess"),
        ],
    )?;
    let agent = site.start()?;
    let mut keys = Vec::new();
    for name in ["app-0", "app-1"] {
        let pod = site.run(name, "app")?;
        let session = site.session(&credentials(&pod, &role("app"))?)?;
        let bound = session.claims.kubernetes.clone().and_then(|kubernetes| kubernetes.pod);
        ensure!(bound.is_some_and(|pod| pod.name == name), "{:?}", session.claims);
        let calls = site.calls("app");
        let call = calls.iter().find(|call| call.session_name == format!("{}.app.{name}", site.namespace()));
        let call = call.ok_or_else(|| anyhow::anyhow!("{calls:?}"))?;
        ensure!(call.duration_seconds.as_deref() == Some("1800") && call.policy.as_deref() == Some(policy), "{call:?}");
        ensure!(call.policy_arns == ["arn:aws:iam::aws:policy/ReadOnlyAccess"], "{call:?}");
        keys.push(session.access_key_id);
    }
    ensure!(keys[0] != keys[1]);
    agent.stop()
}

#[test]
fn recreated_account_gets_new_session() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let agent = site.start()?;
    let pod = site.run("app-0", "app")?;
    let before = site.assert_served(&pod, "app")?;
    site.delete_account("app")?;
    poll("the account to be deleted", WATCH_TIMEOUT, || list(&pod).ok().filter(|list| list.status == 404))?;
    ensure!(credentials(&pod, &role("app"))?.status == 404, "the session must end with its account");
    site.account("app")?;
    poll("the new account", WATCH_TIMEOUT, || list(&pod).ok().filter(|list| list.status == 200))?;
    let after = site.assert_served(&pod, "app")?;
    let uid = |key: &str| Some(site.sts.session(key)?.claims.kubernetes?.service_account.uid);
    ensure!(before != after && uid(&before) != uid(&after) && uid(&after).is_some());
    ensure!(site.calls("app").len() == 2);
    agent.stop()
}
