//! Groups of the node's metadata: the paths that programs request, on a node that has them.

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::http::TOKEN;
use lab::imds::{Instance, NODE_ROLE};
use lab::net::Pod;
use lab::poll::poll;
use lab::site::{POLLED_BY_GROUPS, Site};

use super::{TIMEOUT, get, get_with, no_upstream_calls_except_sts, site};

const M: &str = "/latest/meta-data";
const SPOT: &str = "/latest/meta-data/spot/instance-action";
const MAC: &str = "0e:49:61:0f:c3:11";
const OTHER: &str = "0e:49:61:0f:c3:12";
const ALL: &str = "default,vpc,tags,lifecycle";

/// Returns a site whose node has the metadata of an EKS worker with two interfaces and two volumes.
fn worker() -> Result<Site> {
    let mut site = site()?;
    site.polled = POLLED_BY_GROUPS.to_vec();
    for (path, document) in [
        ("mac", MAC),
        ("block-device-mapping/ami", "/dev/xvda"),
        ("block-device-mapping/ebs1", "sdb"),
        ("block-device-mapping/ebs2", "sdc"),
        ("block-device-mapping/root", "/dev/xvda"),
        ("events/maintenance/scheduled", "[]"),
        ("events/maintenance/history", "[]"),
        ("autoscaling/target-lifecycle-state", "InService"),
        ("instance-life-cycle", "spot"),
        ("tags/instance/Name", "a worker, of the shop"),
        ("tags/instance/aws:autoscaling:groupName", "workers"),
        ("public-keys/0/openssh-key", "ssh-ed25519 of-the-node"),
        ("identity-credentials/ec2/info", "{}"),
        ("iam-eks-info", "{}"),
    ] {
        site.set_node_metadata(&format!("{M}/{path}"), Some(document));
    }
    for (mac, device) in [(MAC, "0"), (OTHER, "1")] {
        for (name, value) in [
            ("device-number", device),
            ("interface-id", "eni-0123456789abcdef0"),
            ("local-ipv4s", "10.0.0.10"),
            ("owner-id", "444455556666"),
            ("subnet-id", "subnet-0123456789abcdef0"),
            ("vpc-id", "vpc-0123456789abcdef0"),
            ("vpc-ipv4-cidr-block", "10.0.0.0/16"),
            ("vpc-ipv4-cidr-blocks", "10.0.0.0/16\n100.64.0.0/16"),
        ] {
            site.set_node_metadata(&format!("{M}/network/interfaces/macs/{mac}/{name}"), Some(value));
        }
    }
    Ok(site)
}

fn start(site: &Site, allowed: &str) -> Result<Agent> {
    Agent::start(&site.node, &site.options.clone().flag("--node-metadata", allowed))
}

/// Gets a path, which is 503 until the agent has fetched it.
fn read(pod: &Pod, path: &str) -> Result<String> {
    let response = poll(&format!("a response for {path}"), TIMEOUT, || {
        get(pod, path).ok().filter(|response| response.status != 503)
    })?;
    response.ok().with_context(|| path.to_owned())
}

/// IMDS-32: the requests of each program (docs/node-metadata.md).
#[test]
fn groups_answer_what_programs_ask() -> Result<()> {
    let site = worker()?;
    let (reader, idle) = (site.pod_with_role("reader")?, site.pod("idle")?);
    let agent = start(&site, ALL)?;
    for pod in [&reader, &idle] {
        // AWS Load Balancer Controller, and Vector, which also requests the subnet.
        let mac = read(pod, &format!("{M}/mac"))?;
        let interface = format!("{M}/network/interfaces/macs/{mac}");
        ensure!(read(pod, &format!("{interface}/vpc-id"))? == "vpc-0123456789abcdef0");
        ensure!(read(pod, &format!("{interface}/subnet-id"))? == "subnet-0123456789abcdef0");
        ensure!(read(pod, &format!("{interface}/vpc-ipv4-cidr-blocks"))? == "10.0.0.0/16\n100.64.0.0/16");
        // EBS CSI driver: it counts MAC addresses, and names with "ebs".
        let document = read(pod, "/latest/dynamic/instance-identity/document")?;
        ensure!(document.contains(&Instance::default().instance_id), "{document}");
        ensure!(read(pod, &format!("{M}/network/interfaces/macs"))? == format!("{MAC}/\n{OTHER}/"));
        ensure!(read(pod, &format!("{M}/block-device-mapping"))? == "ami\nebs1\nebs2\nroot");
        ensure!(get(pod, &format!("{M}/outpost-arn"))?.status == 404);
        // aws-node-termination-handler.
        ensure!(read(pod, &format!("{M}/events/maintenance/scheduled"))? == "[]");
        ensure!(read(pod, &format!("{M}/autoscaling/target-lifecycle-state"))? == "InService");
        ensure!(read(pod, &format!("{M}/instance-life-cycle"))? == "spot");
        for none in [SPOT, &format!("{M}/events/recommendations/rebalance"), &format!("{M}/public-ipv4")] {
            ensure!(get(pod, none)?.status == 404, "{none}");
        }
        // fluent-bit appends a slash to all paths but tags.
        ensure!(read(pod, &format!("{M}/mac/"))? == MAC);
        ensure!(read(pod, &format!("{interface}/vpc-id/"))? == "vpc-0123456789abcdef0");
        let keys = read(pod, &format!("{M}/tags/instance"))?;
        ensure!(keys == "Name\naws:autoscaling:groupName", "{keys}");
        ensure!(read(pod, &format!("{M}/tags/instance/Name"))? == "a worker, of the shop");
        ensure!(read(pod, &format!("{M}/tags/instance/aws%3Aautoscaling%3AgroupName"))? == "workers");
    }
    no_upstream_calls_except_sts(&site, &["reader"])?;
    agent.stop()
}

/// IMDS-15
#[test]
fn groups_are_listed_as_on_ec2() -> Result<()> {
    let site = worker()?;
    let idle = site.pod("idle")?;
    let agent = start(&site, "vpc,tags,lifecycle")?;
    let interface = format!("network/interfaces/macs/{MAC}");
    for (folder, entries) in [
        ("", "autoscaling/\nblock-device-mapping/\nevents/\ninstance-life-cycle\nmac\nnetwork/\ntags/"),
        ("autoscaling", "target-lifecycle-state"),
        ("events", "maintenance/"),
        ("events/maintenance", "history\nscheduled"),
        ("network", "interfaces/"),
        ("network/interfaces", "macs/"),
        (
            &interface,
            "device-number\ninterface-id\nowner-id\nsubnet-id\nvpc-id\nvpc-ipv4-cidr-block\nvpc-ipv4-cidr-blocks",
        ),
        ("tags", "instance/"),
    ] {
        for slash in ["", "/"] {
            let path = format!("{M}/{folder}{slash}").replace("data//", "data/");
            let listing = poll(&format!("the listing of {path}"), TIMEOUT, || {
                get(&idle, &path).ok().filter(|listing| listing.status == 200 && listing.body == entries)
            });
            ensure!(listing.is_ok(), "{path}: {:?}", get(&idle, &path)?);
        }
    }
    no_upstream_calls_except_sts(&site, &[])?;
    agent.stop()
}

#[test]
fn spot_notice_reaches_pods_and_vanishes() -> Result<()> {
    let site = worker()?;
    let idle = site.pod("idle")?;
    let agent = start(&site, "lifecycle")?;
    let notice = r#"{"action": "terminate", "time": "2026-11-29T10:20:00Z"}"#;
    let status = |wanted: u16| {
        poll(&format!("{wanted} for the notice"), TIMEOUT, || {
            get(&idle, SPOT).ok().filter(|response| response.status == wanted)
        })
    };
    status(404)?;
    site.set_node_metadata(SPOT, Some(notice));
    ensure!(status(200)?.body == notice);
    ensure!(get(&idle, &format!("{M}/spot/"))?.ok()? == "instance-action");
    site.set_node_metadata(SPOT, None);
    status(404)?;
    ensure!(get(&idle, &format!("{M}/spot/"))?.status == 404);
    no_upstream_calls_except_sts(&site, &[])?;
    agent.stop()
}

/// IMDS-32: groups open their own paths and no others of the node's service.
#[test]
fn groups_open_nothing_else() -> Result<()> {
    let site = worker()?;
    let reader = site.pod_with_role("reader")?;
    let agent = start(&site, ALL)?;
    read(&reader, &format!("{M}/tags/instance/Name"))?;
    read(&reader, &format!("{M}/network/interfaces/macs/{MAC}/vpc-id"))?;
    for path in [
        &format!("{M}/iam/security-credentials/{NODE_ROLE}"),
        &format!("{M}/iam-eks-info"),
        &format!("{M}/identity-credentials/ec2/info"),
        &format!("{M}/public-keys/0/openssh-key"),
        &format!("{M}/network/interfaces/macs/{MAC}/local-ipv4s"),
        &format!("{M}/network/interfaces/macs/{OTHER}"),
        &format!("{M}/network/interfaces/macs/{OTHER}/vpc-id"),
        &format!("{M}/block-device-mapping/root"),
        &format!("{M}/tags/instance/other"),
        &format!("{M}/tags/instance/..%2fiam"),
        "/latest/user-data",
        "/latest/dynamic/instance-identity/pkcs7",
        "/latest/dynamic/instance-identity/rsa2048",
        "/latest/dynamic/instance-identity/signature",
    ] {
        ensure!(get(&reader, path)?.status == 404, "{path}");
    }
    for path in [format!("{M}/mac"), format!("{M}/tags/instance/"), SPOT.to_owned()] {
        let response = get_with(&mut reader.imds(), &path, &[(TOKEN, "wrong")])?;
        ensure!(response.status == 401, "{path} with a wrong IMDS token: {response:?}");
    }
    no_upstream_calls_except_sts(&site, &["reader"])?;
    agent.stop()?;
    let agent = start(&site, "default")?;
    for path in [SPOT.to_owned(), format!("{M}/mac"), format!("{M}/network/"), format!("{M}/tags/instance")] {
        ensure!(get(&reader, &path)?.status == 404, "{path} is in no allowed group");
    }
    agent.stop()?;
    for (path, why) in [
        ("dynamic/instance-identity/pkcs7", "proves the node's identity to others"),
        ("meta-data/identity-credentials/ec2/info", "identity role"),
        ("meta-data/iam-eks-info", "IAM data of the node"),
    ] {
        let options = site.options.clone().flag("--node-metadata", format!("vpc,{path}"));
        let output = Agent::run_to_end(&site.node, &options)?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        let named = stderr.contains(&format!("--node-metadata {path}: is never served")) && stderr.contains(why);
        ensure!(output.status.code() == Some(2) && named, "{output:?}");
    }
    Ok(())
}
