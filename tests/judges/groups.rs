//! The same programs with groups of the node's metadata allowed.

use anyhow::{Result, ensure};
use lab::clients::Installed;
use lab::site::{POLLED_BY_GROUPS, Site};
use serde_json::{Value, json};

use super::{Lab, python::last_line, run};

const MAC: &str = "0e:49:61:0f:c3:11";
const TAG: &str = "workers";

/// Starts a node with metadata in each group, and an agent that may read these groups.
fn start(groups: &'static str) -> Result<Lab> {
    let mut site = Site::new(env!("CARGO_BIN_EXE_kirsa"))?;
    site.polled = POLLED_BY_GROUPS.to_vec();
    let interface = format!("network/interfaces/macs/{MAC}");
    for (path, document) in [
        ("mac", MAC),
        ("block-device-mapping/root", "/dev/xvda"),
        ("events/maintenance/scheduled", "[]"),
        ("events/maintenance/history", "[]"),
        ("instance-life-cycle", "spot"),
        ("tags/instance/aws:autoscaling:groupName", TAG),
        (&format!("{interface}/device-number"), "0"),
        (&format!("{interface}/interface-id"), "eni-0123456789abcdef0"),
        (&format!("{interface}/owner-id"), "777788889999"),
        (&format!("{interface}/subnet-id"), "subnet-0123456789abcdef0"),
        (&format!("{interface}/vpc-id"), "vpc-0123456789abcdef0"),
        (&format!("{interface}/vpc-ipv4-cidr-block"), "10.0.0.0/16"),
        (&format!("{interface}/vpc-ipv4-cidr-blocks"), "10.0.0.0/16\n100.64.0.0/16"),
    ] {
        site.set_node_metadata(&format!("/latest/meta-data/{path}"), Some(document));
    }
    site.options = site.options.clone().flag("--node-metadata", format!("default,{groups}"));
    let lab = Lab::with_site(site)?;
    // Each group has its own schedule, and requests wait until it has been fetched.
    for path in ["tags/instance/", "mac", "network/interfaces/macs/", "block-device-mapping/", "events/maintenance/"] {
        let response = lab.reader.imds().get(&format!("/latest/meta-data/{path}")).send()?;
        ensure!([200, 404].contains(&response.status), "{path}: {response:?}");
    }
    Ok(lab)
}

#[test]
fn cloud_init_finds_tags_and_lifecycle() -> Result<()> {
    let Some(tool) = Installed::find_or_skip("cloud-init") else { return Ok(()) };
    let lab = start("tags,lifecycle")?;
    let found = last_line(run(&lab.reader, tool.command())?.ok()?)?;
    let metadata = &found["meta-data"];
    ensure!(metadata["tags"]["instance"]["aws:autoscaling:groupName"] == TAG, "{found:#}");
    ensure!(metadata["events"]["maintenance"] == json!({"history": "[]", "scheduled": "[]"}), "{found:#}");
    ensure!(metadata["instance-life-cycle"] == "spot", "{found:#}");
    lab.stop()
}

/// Names of block devices and interfaces are listed, since drivers count them, but not served. cloud-init requests each
/// one and gives up. It has no purpose in a pod, and only needs to exit.
#[test]
fn cloud_init_ends_where_more_is_listed() -> Result<()> {
    let Some(tool) = Installed::find_or_skip("cloud-init") else { return Ok(()) };
    let lab = start("vpc")?;
    let found = last_line(run(&lab.reader, tool.command())?.ok()?)?;
    ensure!(found["meta-data"] == json!({}) && found["dynamic"] != Value::Null, "{found:#}");
    lab.stop()
}

#[test]
fn ec2_metadata_package_reads_groups() -> Result<()> {
    let Some(package) = Installed::find_or_skip("ec2-metadata") else { return Ok(()) };
    let lab = start("vpc,tags,lifecycle")?;
    let found = last_line(run(&lab.idle, package.python("with_ec2_metadata.py"))?.ok()?)?;
    ensure!(found["mac"] == MAC && found["instance_life_cycle"] == "spot", "{found:#}");
    ensure!(found["tags"] == json!({"aws:autoscaling:groupName": TAG}), "{found:#}");
    ensure!(found["spot_instance_action"] == Value::Null, "{found:#}");
    let interface = &found["network_interfaces"][MAC];
    ensure!(interface["vpc_id"] == "vpc-0123456789abcdef0", "{found:#}");
    ensure!(interface["subnet_id"] == "subnet-0123456789abcdef0" && interface["device_number"] == 0, "{found:#}");
    ensure!(interface["vpc_ipv4_cidr_blocks"] == json!(["10.0.0.0/16", "100.64.0.0/16"]), "{found:#}");
    lab.stop()
}

#[test]
fn ec2_metadata_tool_prints_groups() -> Result<()> {
    let Some(tool) = Installed::find_or_skip("amazon-ec2-utils") else { return Ok(()) };
    let lab = start("vpc,tags,lifecycle")?;
    let mut command = tool.command();
    command.args(["--tags", "--block-device-mapping"]);
    let lines = run(&lab.reader, command)?.ok()?;
    let printed = |name: &str, value: &str| lines.iter().any(|line| line.trim() == format!("{name}: {value}").trim());
    ensure!(printed("aws:autoscaling:groupName", TAG), "{lines:#?}");
    // Its name is listed without its device.
    ensure!(printed("root", ""), "{lines:#?}");
    lab.stop()
}
