//! Container credentials, with real projected tokens and token reviews. Token and source address must identify the same
//! pod.

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::http::{Client, Response};
use lab::net::{CONTAINER, CONTAINER6, Pod};
use lab::poll::poll;
use lab::sts::{Effect, Fault};

use crate::TIMEOUT;
use crate::rights::AgentRights;
use crate::site::{AUDIENCE, Site, arn, blocking, role};

pub(crate) const PATH: &str = "/v1/credentials";
pub(crate) const PODS_AUDIENCE: &str = "pods.eks.amazonaws.com";

pub(crate) fn site() -> Result<Site> {
    let mut site = Site::with_rights(AgentRights::ContainerCredentials)?;
    site.options = site.options.switch("--container-credentials");
    Ok(site)
}

/// Starts a pod; returns it and its UID.
pub(crate) fn run(site: &Site, name: &str, account: &str) -> Result<(Pod, String)> {
    let uid = site.bind(name, account)?;
    let pod = site.attach(name)?;
    site.report_address(&pod)?;
    Ok((pod, uid))
}

/// Mints the token that the kubelet would project into the pod.
pub(crate) fn token(site: &Site, account: &str, pod: (&str, &str), audience: &str) -> Result<String> {
    blocking(site.api.token(site.namespace(), account, pod, Some(audience)))
}

/// Returns a client of the service per address family of the pod.
fn services(pod: &Pod) -> Vec<Client> {
    let v6 = pod.ip6().map(|_| Client::new(pod.netns(), (CONTAINER6, 80)));
    [Client::new(pod.netns(), (CONTAINER, 80))].into_iter().chain(v6).collect()
}

fn request(pod: &Pod, token: &str) -> Result<Response> {
    Client::new(pod.netns(), (CONTAINER, 80)).get(PATH).header("Authorization", token).send()
}

/// Requests until the response is not 503: token reviews are rate-limited per pod.
fn retry_while_503(pod: &Pod, token: &str) -> Result<Response> {
    poll("a response other than 503", TIMEOUT, || match request(pod, token) {
        Ok(answer) if answer.status == 503 => None,
        answer => Some(answer),
    })?
}

fn assert_tokens_not_logged(agent: &Agent, tokens: &[String]) -> Result<()> {
    let lines = agent.process().lines();
    for token in tokens {
        for part in token.split('.').filter(|part| part.len() > 40) {
            ensure!(!lines.iter().any(|line| line.contains(part)), "a token is in the log");
        }
    }
    Ok(())
}

#[test]
fn own_token_gets_own_credentials() -> Result<()> {
    let site = site()?;
    site.account("reader")?;
    let agent = site.start()?;
    let (pod, uid) = run(&site, "reader-0", "reader")?;
    let token = token(&site, "reader", ("reader-0", &uid), PODS_AUDIENCE)?;
    let key = site.assert_served(&pod, "reader")?;
    for mut service in services(&pod) {
        for path in [PATH, "/v1/credentials/", "/v1/credentials?x=y"] {
            let answer = service.get(path).header("Authorization", &token).send()?;
            ensure!(answer.status == 200 && answer.header("content-type") == Some("application/json"), "{answer:?}");
            site.assert_session_of(&site.session(&answer)?, "reader")?;
            let document = answer.json()?;
            let members: Vec<&str> = document.as_object().context("an object")?.keys().map(String::as_str).collect();
            let agents = ["AccessKeyId", "AccountId", "Expiration", "SecretAccessKey", "Token"];
            ensure!(members.len() == 5 && agents.iter().all(|member| members.contains(member)), "{document}");
            ensure!(document["AccountId"] == "111122223333" && document["AccessKeyId"] == key.as_str(), "{document}");
        }
        let head = service.request("HEAD", PATH).header("Authorization", &token).send()?;
        ensure!(head.status == 200 && head.body.is_empty());
        for (method, path, status) in [
            ("POST", PATH, 405),
            ("PUT", "/latest/api/token", 405),
            ("GET", "/", 404),
            ("GET", "/latest/meta-data/iam/security-credentials/", 404),
            ("GET", "/v1/credentials/reader-role", 404),
        ] {
            let answer = service.request(method, path).header("Authorization", &token).send()?;
            ensure!(answer.status == status && answer.body.ends_with('\n'), "{method} {path}: {answer:?}");
        }
    }
    ensure!(
        pod.imds().get(PATH).header("Authorization", &token).send()?.status == 404,
        "the metadata address does not serve it"
    );
    ensure!(site.calls("reader").len() == 1, "one session for both services");
    assert_tokens_not_logged(&agent, &[token])?;
    agent.stop()
}

#[test]
fn token_of_another_pod_is_refused() -> Result<()> {
    let site = site()?;
    ["reader", "writer"].iter().try_for_each(|account| site.account(account))?;
    let agent = site.start()?;
    let ((pod, uid), (other, other_uid)) = (run(&site, "reader-0", "reader")?, run(&site, "writer-0", "writer")?);
    let (_, sibling_uid) = run(&site, "reader-1", "reader")?;
    site.assert_served(&pod, "reader")?;
    site.assert_served(&other, "writer")?;
    let own = token(&site, "reader", ("reader-0", &uid), PODS_AUDIENCE)?;
    let of_other = token(&site, "writer", ("writer-0", &other_uid), PODS_AUDIENCE)?;
    let expired = site.api.resigned(&own, |claims| {
        let now = claims["iat"].as_i64().unwrap_or_default();
        for (claim, ago) in [("iat", 7_200), ("nbf", 7_200), ("exp", 3_600)] {
            claims[claim] = (now - ago).into();
        }
    })?;
    let unbound = site.api.resigned(&own, |claims| {
        claims["kubernetes.io"].as_object_mut().map(|bound| bound.remove("pod"));
    })?;
    let (claims, signature) = (own.rsplit_once('.').context("parts")?.0, of_other.rsplit_once('.').context("parts")?.1);
    let cases = [
        (of_other.clone(), 403, "container_token_mismatch"),
        (token(&site, "reader", ("reader-1", &sibling_uid), PODS_AUDIENCE)?, 403, "container_token_mismatch"),
        (unbound, 403, "container_token_mismatch"),
        (token(&site, "reader", ("reader-0", &uid), AUDIENCE)?, 400, "container_token_refused"),
        (
            blocking(site.api.token(site.namespace(), "reader", ("reader-0", &uid), None))?,
            400,
            "container_token_refused",
        ),
        (expired, 400, "container_token_refused"),
        (format!("{claims}.{signature}"), 400, "container_token_refused"),
        ("e30.e30.c2lnbmF0dXJl".into(), 400, "container_token_refused"),
        (format!("Bearer {own}"), 400, "container_token_refused"),
        ("garbage".into(), 400, "container_token_refused"),
        ("".into(), 400, "container_token_refused"),
    ];
    for (token, status, reason) in &cases {
        let before = agent.metric("kirsa_refusals_total", &[("reason", reason)])?;
        let answer = retry_while_503(&pod, token)?;
        let shown = &token[..token.len().min(12)];
        ensure!(answer.status == *status, "{shown}…: {reason}: {answer:?}");
        ensure!(answer.header("content-type") == Some("text/plain; charset=utf-8"), "{answer:?}");
        ensure!(answer.body.lines().count() == 1 && !answer.body.contains("writer"), "{answer:?}");
        ensure!(agent.metric("kirsa_refusals_total", &[("reason", reason)])? > before, "{shown}…: not by {reason}");
    }
    let mut service = Client::new(pod.netns(), (CONTAINER, 80));
    ensure!(service.get(PATH).send()?.status == 400, "without a header");
    let both = service.get(PATH).header("Authorization", &own).header("Authorization", &of_other).send()?;
    ensure!(both.status == 400, "{both:?}");
    let huge = "x".repeat(64 << 10);
    ensure!(Client::new(pod.netns(), (CONTAINER, 80)).get(PATH).header("Authorization", &huge).send()?.status == 431);
    ensure!(request(&other, &own)?.status == 403, "with the pods swapped");
    // The pod still gets its own credentials, and STS was called for nothing else.
    ensure!(site.session(&retry_while_503(&pod, &own)?)?.role_arn == arn("reader"));
    ensure!(site.sts.calls().len() == 2, "{:?}", site.sts.calls());
    assert_tokens_not_logged(&agent, &cases.map(|(token, ..)| token))?;
    agent.stop()
}

#[test]
fn token_of_former_pod_is_refused() -> Result<()> {
    let site = site()?;
    site.account("first")?;
    site.account("second")?;
    let agent = site.start()?;
    let (first, uid) = run(&site, "first-0", "first")?;
    let (address, old) = (first.address(), token(&site, "first", ("first-0", &uid), PODS_AUDIENCE)?);
    ensure!(request(&first, &old)?.status == 200);
    site.delete("first-0")?;
    first.delete();
    let uid = site.bind("second-0", "second")?;
    let second = site.attach_at("second-0", address)?;
    site.report_address(&second)?;
    let own = token(&site, "second", ("second-0", &uid), PODS_AUDIENCE)?;
    ensure!(site.session(&retry_while_503(&second, &own)?)?.role_arn == arn("second"));
    // The cached review of the former pod does not apply; the API server's own cache takes a moment to expire.
    let answer = poll("the token to be refused", TIMEOUT, || match request(&second, &old) {
        Ok(answer) if [400, 403].contains(&answer.status) => Some(Ok(answer)),
        Ok(answer) if answer.status == 503 => None,
        other => Some(other),
    })??;
    ensure!([400, 403].contains(&answer.status), "{answer:?}");
    agent.stop()
}

#[test]
fn refusals_match_metadata_service() -> Result<()> {
    let site = site()?;
    site.annotate("idle", &[])?;
    site.account("denied")?;
    site.sts.inject(Fault::always(Effect::error("AccessDenied")).of_role(&arn("denied")));
    let agent = site.start()?;
    for (account, status, reason) in [("idle", 404, "no_role"), ("denied", 403, "access_denied")] {
        let name = format!("{account}-0");
        let (pod, uid) = run(&site, &name, account)?;
        let answer = retry_while_503(&pod, &token(&site, account, (&name, &uid), PODS_AUDIENCE)?)?;
        ensure!(answer.status == status && !answer.body.contains(&role(account)), "{account}: {answer:?}");
        agent.wait_for_refusal(reason)?;
    }
    let unknown = site.node.pod("unknown", lab::net::Shape::RoutedBare)?;
    ensure!(request(&unknown, "e30.e30.c2lnbmF0dXJl")?.status == 503, "refused by its address, before a token review");
    agent.wait_for_refusal("unknown_pod")?;
    agent.stop()
}

#[test]
fn custom_audience_replaces_default() -> Result<()> {
    let mut site = site()?;
    site.options = site.options.flag("--container-audience", "credentials.example");
    site.account("app")?;
    let agent = site.start()?;
    let (pod, uid) = run(&site, "app-0", "app")?;
    let (of_eks, own) = (
        token(&site, "app", ("app-0", &uid), PODS_AUDIENCE)?,
        token(&site, "app", ("app-0", &uid), "credentials.example")?,
    );
    ensure!(retry_while_503(&pod, &of_eks)?.status == 400);
    ensure!(site.session(&retry_while_503(&pod, &own)?)?.role_arn == arn("app"));
    agent.stop()
}

#[test]
fn missing_review_right_names_component() -> Result<()> {
    let mut site = Site::new()?;
    site.options = site.options.switch("--container-credentials");
    site.account("app")?;
    let agent = site.start()?;
    let (pod, uid) = run(&site, "app-0", "app")?;
    let answer = request(&pod, &token(&site, "app", ("app-0", &uid), PODS_AUDIENCE)?)?;
    ensure!(answer.status == 503, "{answer:?}");
    let refusal = agent.wait_for_refusal("review_forbidden")?;
    ensure!(refusal.to_string().contains("daemonset/components/container-credentials"), "{refusal}");
    site.assert_served(&pod, "app")?;
    agent.stop()
}
