//! Request parameters of AssumeRoleWithWebIdentity: duration, session policies and audience.

use anyhow::{Result, ensure};
use lab::agent::field;
use lab::issuer;
use lab::sts::{Keys, Provider, Role};
use lab::workloads::Workload;

use super::{credentials, detail, list, refusal, session, site};

const POLICY: &str =
    r#"{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"s3:GetObject","Resource":"*"}]}"#;

#[test]
fn duration_and_policies_reach_sts() -> Result<()> {
    let site = site()?;
    let (plain, scoped) = (site.pod_with_role("plain")?, site.stranger("scoped")?);
    let arns = "arn:aws:iam::aws:policy/ReadOnlyAccess,arn:aws:iam::111122223333:policy/team";
    let entry = site.with_role(&scoped)?.annotation("kirsa.dev/session-duration", "7200");
    let entry = entry.annotation("kirsa.dev/session-policy", POLICY);
    site.put(entry.annotation("kirsa.dev/session-policy-arns", arns))?;
    let agent = site.start()?;
    for pod in [&plain, &scoped] {
        session(&site, pod, &credentials(pod)?)?;
    }
    let calls = site.calls("plain");
    ensure!(calls[0].duration_seconds.as_deref() == Some("3600") && calls[0].session_name == "default.plain");
    ensure!(calls[0].policy.is_none() && calls[0].policy_arns.is_empty(), "{calls:?}");
    let calls = site.calls("scoped");
    ensure!(calls[0].duration_seconds.as_deref() == Some("7200") && calls[0].session_name == "default.scoped");
    ensure!(calls[0].policy.as_deref() == Some(POLICY) && calls[0].policy_arns.join(",") == arns, "{calls:?}");
    agent.stop()
}

/// STS rejects a duration above the role's maximum without naming that maximum.
#[test]
fn excessive_duration_falls_back_to_default() -> Result<()> {
    let site = site()?;
    let reader = site.stranger("reader")?;
    site.put(site.with_role(&reader)?.annotation("kirsa.dev/session-duration", "7200"))?;
    let subject = issuer::subject("default", "reader");
    site.sts.set_role(Role::trusting(&site.arn("reader"), site.issuer.url(), &subject).max_session_duration(3_600));
    let agent = site.start()?;
    session(&site, &reader, &credentials(&reader)?)?;
    let durations: Vec<_> = site.calls("reader").into_iter().filter_map(|call| call.duration_seconds).collect();
    ensure!(durations == ["7200", "3600"], "{durations:?}");
    agent.wait_for_log(|entry| {
        field(entry, "level") == Some("WARN") && field(entry, "role_arn") == Some(&site.arn("reader"))
    })?;
    agent.stop()
}

/// STS decides whether the token's audience is one of the provider's client IDs.
#[test]
fn token_with_custom_audience_is_accepted() -> Result<()> {
    let site = site()?;
    let other = issuer::Issuer::new("https://other.example/cluster-1")?;
    let provider = Provider::new(other.url(), Keys::Given(other.jwks()?));
    site.sts.set_provider(Provider { client_ids: vec!["my-sts".into()], ..provider });
    let pod = site.pod_with_role("other")?;
    let subject = issuer::subject("default", "other");
    let mut role = serde_json::to_value(Role::trusting(&site.arn("other"), other.url(), &subject))?;
    let conditions = &mut role["AssumeRolePolicyDocument"]["Statement"][0]["Condition"]["StringEquals"];
    conditions["other.example/cluster-1:aud"] = "my-sts".into();
    site.sts.set_role(serde_json::from_value(role)?);
    site.write_token("other", other.mint(&subject, "my-sts", 600, serde_json::Value::Null)?)?;
    let agent = site.start()?;
    let session = session(&site, &pod, &credentials(&pod)?)?;
    ensure!(session.claims.issuer == other.url() && session.claims.audience == ["my-sts"], "{session:?}");
    agent.stop()
}

/// A malformed annotation is refused without a call to STS; the refusal names the object, annotation and expected form.
#[test]
fn malformed_annotation_is_refused_before_sts() -> Result<()> {
    let site = site()?;
    let mut pods = Vec::new();
    for (name, annotation, value, right) in [
        ("role", "eks.amazonaws.com/role-arn", "reader", "must be arn:"),
        ("audience", "eks.amazonaws.com/audience", "a b", "one word"),
        ("duration", "kirsa.dev/session-duration", "900", "1800"),
        ("scope", "kirsa.dev/session-scope", "node", "service-account or pod"),
        ("policy", "kirsa.dev/session-policy", "{", "JSON"),
        ("arns", "kirsa.dev/session-policy-arns", "ReadOnlyAccess", "must be arn:"),
    ] {
        let pod = site.stranger(name)?;
        let entry = match name {
            "role" => Workload::new(&pod, name).role(value, &site.write_token(name, "")?),
            _ => site.with_role(&pod)?.annotation(annotation, value),
        };
        site.put(entry)?;
        pods.push((pod, annotation, right));
    }
    let agent = site.start()?;
    for (pod, annotation, right) in &pods {
        ensure!(list(pod)?.status == 403 && credentials(pod)?.status == 403, "{annotation}");
        let entry = refusal(&agent, pod, "bad_annotation")?;
        for word in [*annotation, right, &format!("default/{}", pod.name())] {
            ensure!(detail(&entry).contains(word), "{word} in {entry}");
        }
    }
    ensure!(site.sts.calls().is_empty());
    agent.stop()
}
