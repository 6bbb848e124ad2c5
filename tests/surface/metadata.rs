//! The node's metadata: what pods can read, and what is replaced or withheld.

use anyhow::{Context, Result, ensure};
use lab::agent::{Agent, field};
use lab::imds::{Instance, NODE_ROLE};
use lab::site::{ACCOUNT, Site};

use super::{get, no_upstream_calls_except_sts, site};

const DOCUMENT: &str = "/latest/dynamic/instance-identity/document";

fn start(site: &Site, flags: &[(&str, &str)]) -> Result<Agent> {
    let options = flags.iter().fold(site.options.clone(), |options, (flag, value)| options.flag(flag, value));
    let agent = Agent::start(&site.node, &options)?;
    agent.wait_for_log(|entry| field(entry, "message") == Some("node metadata read"))?;
    Ok(agent)
}

/// IMDS-31: Terraform reads its account from here.
#[test]
fn iam_info_is_that_of_the_pods_role() -> Result<()> {
    let site = site()?;
    let (reader, idle) = (site.pod_with_role("reader")?, site.pod("idle")?);
    let agent = start(&site, &[])?;
    let info = get(&reader, "/latest/meta-data/iam/info")?.json()?;
    let arn = info["InstanceProfileArn"].as_str().context("an ARN")?;
    ensure!(
        info["Code"] == "Success" && arn == format!("arn:aws:iam::{ACCOUNT}:instance-profile/reader-role"),
        "{info}"
    );
    ensure!(info["InstanceProfileId"].is_string() && info["LastUpdated"].as_str().is_some_and(|at| at.len() == 20));
    ensure!(get(&idle, "/latest/meta-data/iam/info")?.status == 404);
    no_upstream_calls_except_sts(&site, &["reader"])?;
    agent.stop()
}

/// IMDS-32
#[test]
fn document_has_nodes_region_and_roles_account() -> Result<()> {
    let site = site()?;
    let (reader, idle) = (site.pod_with_role("reader")?, site.pod("idle")?);
    let (agent, instance) = (start(&site, &[])?, Instance::default());
    for pod in [&reader, &idle] {
        for slash in ["", "/"] {
            let placement = |what| get(pod, &format!("/latest/meta-data/placement/{what}{slash}"));
            ensure!(placement("region")?.ok()? == instance.region);
            ensure!(placement("availability-zone")?.ok()? == instance.availability_zone);
            let document = get(pod, &format!("{DOCUMENT}{slash}"))?.json()?;
            ensure!(document["region"] == instance.region, "{document}");
            ensure!(document["accountId"] != instance.account, "{document}");
        }
    }
    ensure!(get(&reader, DOCUMENT)?.json()?["accountId"] == ACCOUNT);
    ensure!(get(&idle, DOCUMENT)?.json()?["accountId"] == "");
    no_upstream_calls_except_sts(&site, &["reader"])?;
    agent.stop()
}

/// IMDS-15: listings have only entries that the pod can read.
#[test]
fn root_listings_name_what_is_served() -> Result<()> {
    let site = site()?;
    let (reader, idle, wrong) = (site.pod_with_role("reader")?, site.pod("idle")?, site.stranger("wrong")?);
    site.put(site.with_role(&wrong)?.annotation("kirsa.dev/session-policy", "nonsense"))?;
    let agent = start(&site, &[])?;
    // If `iam/info` is refused for any reason, `iam/` is not listed.
    ensure!(get(&wrong, "/latest/meta-data/iam/info")?.status == 403);
    ensure!(get(&wrong, "/latest/meta-data/iam/")?.status == 404);
    for (pod, pods_own) in [(&reader, vec!["iam/"]), (&idle, vec![]), (&wrong, vec![])] {
        let expect = |path: &str, entries: &[&str]| -> Result<()> {
            for slash in ["", "/"] {
                let listing = get(pod, &format!("{path}{slash}"))?.ok()?;
                ensure!(listing == entries.join("\n"), "{path}{slash}: {listing:?}");
            }
            Ok(())
        };
        expect("/latest", &["dynamic", "meta-data"])?;
        expect("/latest/dynamic", &["instance-identity/"])?;
        expect("/latest/dynamic/instance-identity", &["document"])?;
        let nodes = ["ami-id", "hostname", "instance-id", "instance-type", "local-hostname", "placement/", "services/"];
        let mut entries = [&pods_own[..], &nodes].concat();
        entries.sort_unstable();
        expect("/latest/meta-data", &entries)?;
    }
    agent.stop()?;
    let agent = site.options.clone().flag("--node-metadata", "none");
    let agent = Agent::start(&site.node, &agent)?;
    ensure!(get(&reader, "/latest")?.ok()? == "meta-data" && get(&reader, "/latest/meta-data/")?.ok()? == "iam/");
    ensure!(get(&reader, "/latest/dynamic")?.status == 404);
    agent.stop()
}

/// IMDS-27, IMDS-32: a 404 is final for SDKs, which would continue without a region.
#[test]
fn requests_wait_for_node_metadata() -> Result<()> {
    let site = site()?;
    let reader = site.pod_with_role("reader")?;
    for _ in 0..5 {
        let agent = Agent::start(&site.node, &site.options)?;
        let region = get(&reader, "/latest/meta-data/placement/region")?;
        ensure!(region.status == 200 && region.body == Instance::default().region, "{region:?}");
        agent.stop()?;
    }
    Ok(())
}

/// IMDS-32: programs request these to detect EC2.
#[test]
fn ec2_detection_finds_the_instance() -> Result<()> {
    let site = site()?;
    let idle = site.pod("idle")?;
    let (agent, instance) = (start(&site, &[])?, Instance::default());
    let read = |what| get(&idle, &format!("/latest/meta-data/{what}"))?.ok();
    ensure!(read("ami-id")? == instance.image_id && read("instance-id")? == instance.instance_id);
    ensure!(read("instance-type")? == instance.instance_type);
    ensure!(read("hostname")? == read("local-hostname")? && read("hostname")?.starts_with("ip-"));
    let document = get(&idle, DOCUMENT)?.json()?;
    ensure!(document["instanceId"] == instance.instance_id && document["imageId"] == instance.image_id, "{document}");
    ensure!(document["privateIp"] == "" && document["accountId"] == "", "{document}");
    ensure!(get(&idle, &format!("/latest/meta-data/iam/security-credentials/{NODE_ROLE}"))?.status == 404);
    no_upstream_calls_except_sts(&site, &[])?;
    agent.stop()
}

/// IMDS-32: a pod can find its region even if its role is unusable.
#[test]
fn identity_document_needs_no_usable_role() -> Result<()> {
    let site = site()?;
    let wrong = site.stranger("wrong")?;
    site.put(site.with_role(&wrong)?.annotation("kirsa.dev/session-policy", "nonsense"))?;
    let agent = start(&site, &[])?;
    ensure!(get(&wrong, "/latest/meta-data/iam/info")?.status == 403);
    let document = get(&wrong, DOCUMENT)?.json()?;
    ensure!(document["region"] == Instance::default().region && document["accountId"] == "", "{document}");
    agent.stop()
}

/// IMDS-32: the allow-list is exact; other paths are 404 even if the node's service has them.
#[test]
fn only_configured_node_metadata_is_served() -> Result<()> {
    let mut site = site()?;
    site.node_metadata = vec!["/latest/meta-data/instance-id"];
    let reader = site.pod_with_role("reader")?;
    let flags = [
        ("--node-metadata", "meta-data/instance-id,meta-data/placement/region"),
        ("--node-metadata-value", "meta-data/placement/region=mars-1"),
    ];
    let agent = start(&site, &flags)?;
    ensure!(get(&reader, "/latest/meta-data/instance-id")?.ok()? == Instance::default().instance_id);
    ensure!(
        get(&reader, "/latest/meta-data/placement/region")?.ok()? == "mars-1",
        "a configured value overrides the node's"
    );
    for path in [
        DOCUMENT,
        "/latest/meta-data/placement/availability-zone",
        "/latest/meta-data/hostname",
        "/latest/meta-data/instance-id/..",
        "/latest/user-data",
        &format!("/latest/meta-data/iam/security-credentials/{NODE_ROLE}"),
    ] {
        ensure!(get(&reader, path)?.status == 404, "{path}");
    }
    no_upstream_calls_except_sts(&site, &["reader"])?;
    agent.stop()?;
    let document = format!("{}={{}}", DOCUMENT.trim_start_matches("/latest/"));
    let output = Agent::run_to_end(&site.node, &site.options.clone().flag("--node-metadata-value", document))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(2) && stderr.contains("generated from the other values"), "{output:?}");
    for path in ["meta-data/iam/info", "user-data", "dynamic/instance-identity/signature", "meta-data"] {
        let output = Agent::run_to_end(&site.node, &site.options.clone().flag("--node-metadata", path))?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(2) && stderr.contains(&format!("--node-metadata {path}")), "{output:?}");
    }
    Ok(())
}
