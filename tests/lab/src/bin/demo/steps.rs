//! The scenes of the demo, in their order: a sentence, what is typed, and what has to come of it.

use anyhow::Result;
use lab::agent::field;
use lab::imds::NODE_ROLE;
use lab::sdk;
use serde_json::Value;

use crate::screen::Screen;
use crate::site::{Guest, Site, assumed_role_arn, role_arn};
use crate::terminal::Typed;

const CREDENTIALS: &str = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";
const TOKEN: &str = "TOKEN=$(curl -sX PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 21600' \\
  http://169.254.169.254/latest/api/token)";
const WITH_TOKEN: &str = "curl -sH \"X-aws-ec2-metadata-token: $TOKEN\" \\\n ";
const STATUS: &str = "curl -so /dev/null -w '%{http_code}\\n' \\\n ";
const METRICS: &str = "curl -s http://127.0.0.1:8182/metrics \\
  | grep -E '^kirsa_(requests|refusals|exchange_seconds_count|cache_[hm]|rule_)'";

pub(crate) fn a_node_has_three_pods(screen: &mut Screen, site: &mut Site) -> Result<()> {
    screen.step("A node runs three pods, each joined to it in another way, and this file says who they are.")?;
    let file = screen.run(&mut site.shell, "cat workloads.yaml")?;
    screen.expect(
        file.status == 0,
        "reader on a bridge, writer routed, idle routed by a link whose host end has no address",
        file,
    )
}

pub(crate) fn kirsa_starts(screen: &mut Screen, site: &mut Site) -> Result<()> {
    screen.step("kirsa starts on the node and has 169.254.169.254 redirected to itself, for pods only.")?;
    start(screen, site)?;
    let ready = screen.run(&mut site.shell, "curl -s http://127.0.0.1:8182/readyz")?;
    screen.expect(ready.text == "ready", "ready", ready)?;
    let rules = screen.run(&mut site.shell, "nft list table inet kirsa")?;
    screen.expect(rules.status == 0, "one table, kirsa's own", rules)
}

fn start(screen: &mut Screen, site: &mut Site) -> Result<()> {
    let addresses = site.node.host_ips().iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let command = format!(
        "kirsa run --workloads workloads.yaml --host-ip {addresses} \\\n  --sts-endpoint-url {} >>kirsa.log 2>&1 &",
        site.sts.url()
    );
    screen.command(site.shell.prompt(), &command)?;
    site.start_kirsa()
}

pub(crate) fn a_pod_asks_with_imdsv2(screen: &mut Screen, site: &mut Site) -> Result<()> {
    screen.step("The reader asks as IMDSv2 does: for a session token, and with it for a role and credentials.")?;
    let shell = &mut site.reader.terminal;
    screen.run(shell, TOKEN)?;
    let roles = screen.run(shell, &format!("{WITH_TOKEN} {CREDENTIALS}"))?;
    screen.expect(roles.text == "reader-role", "the role of its service account", roles)?;
    let document = screen.run(shell, &format!("{WITH_TOKEN} {CREDENTIALS}reader-role"))?;
    expect_credentials(screen, site, "reader", document)
}

pub(crate) fn a_pod_asks_with_imdsv1(screen: &mut Screen, site: &mut Site) -> Result<()> {
    screen.step("The writer asks as IMDSv1 does, without a session token, and is given another role.")?;
    let shell = &mut site.writer.terminal;
    let roles = screen.run(shell, &format!("curl -s {CREDENTIALS}"))?;
    screen.expect(roles.text == "writer-role", "the role of its service account", roles)?;
    let document = screen.run(shell, &format!("curl -s {CREDENTIALS}writer-role"))?;
    expect_credentials(screen, site, "writer", document)
}

/// The document is whole, and STS knows whom it issued those credentials to.
fn expect_credentials(screen: &mut Screen, site: &mut Site, account: &str, document: Typed) -> Result<()> {
    let parsed: Value = serde_json::from_str(&document.text).unwrap_or_default();
    let key = parsed["AccessKeyId"].as_str().unwrap_or_default();
    let secrets = ["SecretAccessKey", "Token"].map(|name| parsed[name].as_str().map(str::to_owned));
    site.secrets.extend(secrets.into_iter().flatten());
    let session = site.sts.session(key);
    let subject = lab::issuer::subject("default", account);
    let met = parsed["Code"] == "Success"
        && session.is_some_and(|session| session.role_arn == role_arn(account) && session.claims.subject == subject);
    screen.expect(met, &format!("STS issued {key} to {subject}"), document)
}

pub(crate) fn sdks_act_as_their_service_accounts(screen: &mut Screen, site: &mut Site) -> Result<()> {
    screen.step("An unmodified SDK, AWS's for Rust, finds these credentials by itself. STS tells whose they are.")?;
    for guest in [&site.reader, &site.writer] {
        let identity = screen.program(guest.terminal.prompt(), &guest.pod, &mut sdk::rust(&site.sts.url())?)?;
        expect_identity(screen, guest, identity)?;
    }
    Ok(())
}

pub(crate) fn so_does_boto3(screen: &mut Screen, site: &mut Site, installed: Result<()>) -> Result<()> {
    screen.step("So does an unmodified boto3.")?;
    if let Err(reason) = installed.and_then(|()| site.boto3_runs()) {
        return Ok(screen.skip(&format!("{reason:#}"))?);
    }
    for guest in [&site.reader, &site.writer] {
        let identity = screen.program(guest.terminal.prompt(), &guest.pod, &mut sdk::boto3(&site.sts.url())?)?;
        expect_identity(screen, guest, identity)?;
    }
    Ok(())
}

fn expect_identity(screen: &mut Screen, guest: &Guest, answer: Typed) -> Result<()> {
    let identity: Value = serde_json::from_str(&answer.text).unwrap_or_default();
    let account = guest.pod.name();
    let claim = format!("the caller is {account}-role, in the session of service account {account}");
    screen.expect(identity["arn"] == assumed_role_arn(account), &claim, answer)
}

pub(crate) fn nobody_gets_the_role_of_another(screen: &mut Screen, site: &mut Site) -> Result<()> {
    screen.step("The reader asks for the writer's role, and for the node's: for this pod they do not exist.")?;
    let shell = &mut site.reader.terminal;
    let writers = screen.run(shell, &format!("curl -si {CREDENTIALS}writer-role"))?;
    screen.expect(is_not_found(&writers), "404, as EC2 answers for a role that there is not", writers)?;
    let nodes = screen.run(shell, &format!("{STATUS} {CREDENTIALS}{NODE_ROLE}"))?;
    screen.expect(nodes.text == "404", "404", nodes)
}

pub(crate) fn a_pod_without_a_role_gets_none(screen: &mut Screen, site: &mut Site) -> Result<()> {
    screen.step("The pod without a role gets none.")?;
    let roles = screen.run(&mut site.idle.terminal, &format!("curl -si {CREDENTIALS}"))?;
    screen.expect(is_not_found(&roles), "404, as EC2 answers for an instance without a profile", roles)
}

fn is_not_found(answer: &Typed) -> bool {
    answer.text.starts_with("HTTP/1.1 404 ")
}

pub(crate) fn only_the_node_reaches_its_own_service(screen: &mut Screen, site: &mut Site) -> Result<()> {
    screen.step("The node itself still reaches its own metadata service, with its own role. No pod ever did.")?;
    let roles = screen.run(&mut site.shell, &format!("curl -s {CREDENTIALS}"))?;
    screen.expect(roles.text == NODE_ROLE, "the node's role, for the node", roles)?;
    let user_data =
        screen.run(&mut site.writer.terminal, &format!("{STATUS} http://169.254.169.254/latest/user-data"))?;
    screen.expect(user_data.text == "404", "nothing of the node's for a pod", user_data)?;
    let (by_node, by_others) = site.canary_hits();
    screen.output(&format!(
        "\nWhat the node's own metadata service was asked, by whom ({} is the node):",
        site.node.host_ip()
    ))?;
    let told = by_node.iter().chain(&by_others).map(|hit| format!("{}  {} {}", hit.from.ip(), hit.method, hit.path));
    screen.output(&told.collect::<Vec<_>>().join("\n"))?;
    let claim = format!("it counted {} requests from the node, and none from pods", by_node.len());
    screen.expect(!by_node.is_empty() && by_others.is_empty(), &claim, by_others)
}

pub(crate) fn kirsa_counts(screen: &mut Screen, site: &mut Site) -> Result<()> {
    screen.step("kirsa's metrics: however often pods asked, STS was asked once for each service account.")?;
    let metrics = screen.run(&mut site.shell, METRICS)?;
    let kirsa = site.kirsa()?;
    let exchanges = kirsa.metric("kirsa_exchange_seconds_count", &[("step", "sts"), ("outcome", "ok")])?;
    let calls = site.sts.calls().len();
    screen.expect(exchanges == 2.0 && calls == 2, "two service accounts with a role, two calls at STS", &metrics)?;
    screen.expect(kirsa.metric("kirsa_refusals_total", &[])? > 0.0, "refusals are counted by reason", metrics)
}

pub(crate) fn kirsa_keeps_an_audit_trail(screen: &mut Screen, site: &mut Site) -> Result<()> {
    screen.step("kirsa's log names who was issued what, and says what to do about a refusal; never a secret.")?;
    site.write_log()?;
    let issued = screen.run(&mut site.shell, "grep 'credentials issued' kirsa.log")?;
    let true_to_sts = |line: &str| {
        let entry: Value = serde_json::from_str(line).unwrap_or_default();
        let session = site.sts.session(field(&entry, "access_key_id").unwrap_or_default());
        session.is_some_and(|session| {
            field(&entry, "role_arn") == Some(&session.role_arn) && field(&entry, "jti") == session.claims.id.as_deref()
        })
    };
    let met = issued.text.lines().count() == 2 && issued.text.lines().all(true_to_sts);
    screen.expect(met, "who got which role, by which token and key, until when; as STS has it", issued)?;
    let refused = screen.run(&mut site.shell, "grep '\"refused\"' kirsa.log")?;
    screen.expect(
        refused.text.contains("\"pod\":\"idle\""),
        "who was refused, why, and what to do about it",
        refused,
    )?;
    let leaked = site.secrets_in_log()?;
    screen.expect(leaked == 0, "no secret key, session token or web identity token in all of the log", leaked)
}

pub(crate) fn a_killed_kirsa_does_not_open_the_way(screen: &mut Screen, site: &mut Site) -> Result<()> {
    screen.step("kirsa is killed: pods are refused at once, and do not get through to the node's role.")?;
    let process = site.kirsa()?.process().id();
    screen.run(&mut site.shell, &format!("kill -9 {process}"))?;
    site.bury_kirsa()?;
    let answer = screen.run(&mut site.reader.terminal, &format!("curl -sv {CREDENTIALS}"))?;
    let refused = answer.status != 0 && answer.text.contains("Connection refused");
    screen.expect(refused, "connection refused", answer)?;
    let (_, by_others) = site.canary_hits();
    screen.expect(by_others.is_empty(), "the node's own metadata service still counted none from pods", by_others)
}

pub(crate) fn a_new_one_goes_on(screen: &mut Screen, site: &mut Site) -> Result<()> {
    screen.step("kirsa starts again: the session token that the reader got from the first one is still good.")?;
    start(screen, site)?;
    let roles = screen.run(&mut site.reader.terminal, &format!("{WITH_TOKEN} {CREDENTIALS}"))?;
    screen.expect(roles.text == "reader-role", "the role of its service account", roles)
}
