//! Which role a service account has: its annotations, as they are when a pod asks.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use lab::agent::field;
use lab::poll::poll;

use crate::outage::Cut;
use crate::site::{ROLE_ARN, Site, arn, credentials, list, role, wait_for_metric};
use crate::{PATIENCE, SOON};

/// Nobody has asked about the account before, so that nothing but the live read can know of the annotation for sure.
#[test]
fn an_annotation_that_was_added_counts_for_the_very_next_request() -> Result<()> {
    let site = Site::new()?;
    site.annotate("late", &[])?;
    let agent = site.start()?;
    let pod = site.run("late-0", "late")?;
    site.account("late")?;
    site.serves(&pod, "late")?;
    agent.stop()
}

/// IMDS-10, IMDS-24: the watch ends what was remembered of a live read.
#[test]
fn the_answer_follows_the_annotation() -> Result<()> {
    let site = Site::new()?;
    site.annotate("app", &[])?;
    site.trust(&arn("other"), "app");
    let agent = site.start()?;
    let pod = site.run("app-0", "app")?;
    let becomes = |status, body: &str| {
        let what = format!("{status} {body}");
        poll(&what, SOON, || list(&pod).ok().filter(|list| list.status == status && list.body.contains(body)))
    };
    ensure!(list(&pod)?.status == 404);
    ensure!(credentials(&pod, &role("app"))?.status == 404);

    site.account("app")?;
    becomes(200, "app-role")?;
    site.serves(&pod, "app")?;

    site.annotate("app", &[(ROLE_ARN, &arn("other"))])?;
    becomes(200, "other-role")?;
    let session = site.session(&credentials(&pod, &role("other"))?)?;
    ensure!(session.role_arn == arn("other") && session.claims.subject == site.subject("app"), "{session:?}");
    ensure!(credentials(&pod, &role("app"))?.status == 404, "the former role's name is nobody's");

    site.annotate("app", &[])?;
    becomes(404, "")?;
    ensure!(credentials(&pod, &role("other"))?.status == 404);
    agent.stop()
}

#[test]
fn a_malformed_annotation_is_refused_and_the_log_says_what_would_be_right() -> Result<()> {
    let site = Site::new()?;
    let agent = site.start()?;
    for (account, annotation, value, right) in [
        ("arn", ROLE_ARN, "app-role", "\"app-role\" must be arn:"),
        ("duration", "kirsa.dev/session-duration", "900", "\"900\" must be a number of seconds from 1800 to 43200"),
    ] {
        let role_arn = arn(account);
        // Of two with one key the last one counts.
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
        ensure!(detail.contains(&name) && detail.contains(annotation) && detail.contains(right), "{detail}");
        ensure!(field(&line, "pod") == Some(account) && site.calls(account).is_empty(), "{line}");

        site.account(account)?;
        poll("the corrected annotation", SOON, || site.serves(&pod, account).ok())?;
    }
    agent.stop()
}

/// IMDS-24
#[test]
fn that_there_is_no_role_is_decided_by_one_live_read_and_remembered() -> Result<()> {
    let site = Site::new()?;
    site.annotate("plain", &[])?;
    site.annotate("unasked", &[])?;
    let agent = site.start()?;
    let (plain, unasked) = (site.run("plain-0", "plain")?, site.run("unasked-0", "unasked")?);
    ensure!(list(&plain)?.status == 404);
    wait_for_metric(&agent, "kirsa_indexed_pods", &[], 3.0)?;
    let cut = Cut::all(&site.node)?;
    ensure!(list(&plain)?.status == 404, "a second read was needed");
    // "No role" is final for SDKs: it is never said without having asked.
    let answer = list(&unasked)?;
    ensure!(answer.status == 503, "{answer:?}");
    agent.wait_for_refusal("account_unavailable")?;
    cut.heal()?;
    poll("the answer once it can be had", PATIENCE, || list(&unasked).ok().filter(|list| list.status == 404))?;
    agent.stop()
}

#[test]
fn annotations_shape_what_sts_is_asked_for() -> Result<()> {
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
fn a_service_account_that_was_made_anew_has_another_session() -> Result<()> {
    let site = Site::new()?;
    site.account("app")?;
    let agent = site.start()?;
    let pod = site.run("app-0", "app")?;
    let before = site.serves(&pod, "app")?;
    site.delete_account("app")?;
    poll("the account to be gone", SOON, || list(&pod).ok().filter(|list| list.status == 404))?;
    ensure!(credentials(&pod, &role("app"))?.status == 404, "the session outlives its account");
    site.account("app")?;
    poll("the new account", SOON, || list(&pod).ok().filter(|list| list.status == 200))?;
    let after = site.serves(&pod, "app")?;
    let uid = |key: &str| Some(site.sts.session(key)?.claims.kubernetes?.service_account.uid);
    ensure!(before != after && uid(&before) != uid(&after) && uid(&after).is_some());
    ensure!(site.calls("app").len() == 2);
    agent.stop()
}
