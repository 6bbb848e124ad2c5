//! Command-line tools of Debian that print an instance's metadata.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use lab::clients::Installed;
use lab::imds::Instance;
use lab::net::Pod;

use super::{Lab, run};

/// Never served: what a node starts with, and what its instance is made of and reached by.
const WITHHELD: [&str; 12] = [
    "ami-launch-index",
    "ami-manifest-path",
    "ancestor-ami-ids",
    "block-device-mapping",
    "kernel-id",
    "product-codes",
    "public-hostname",
    "public-keys",
    "ramdisk-id",
    "reservation-id",
    "security-groups",
    "user-data",
];

/// Amazon Linux's tool. It asks for some documents with two slashes, and takes any error for "not available".
/// Source: <https://github.com/amazonlinux/amazon-ec2-utils/blob/main/ec2-metadata>
#[test]
fn ec2_metadata_prints_what_is_served() -> Result<()> {
    let Some(tool) = Installed::find_or_skip("amazon-ec2-utils") else { return Ok(()) };
    let lab = Lab::start()?;
    for pod in [&lab.reader, &lab.idle] {
        let zone = ("placement", Instance::default().availability_zone);
        let lines = ask(&tool, pod, &[])?;
        // The name of a folder has a line of its own, before its entries or "not available".
        expect(&lines, &["not available", ""], &[zone])?;
        ensure!(!lines.iter().any(|line| line.starts_with([' ', '\t']) || line.starts_with("keyname")), "{lines:#?}");
    }
    // What it asks for with two slashes is not served; this is served, in the same form.
    let id = lab.reader.imds().get("/latest//meta-data/instance-id").send()?.ok()?;
    ensure!(id == Instance::default().instance_id, "{id}");
    for (option, line) in [("--instance-id", "instance-id: i-"), ("--ramdisk-id", "ramdisk-id: not available")] {
        let lines = ask(&tool, &lab.reader, &[option])?;
        ensure!(lines.len() == 1 && lines[0].starts_with(line), "{option}: {lines:?}");
    }
    lab.stop()
}

/// Canonical's tool, which asks for the version of 2009. Any error but 404 ends it.
/// Source: <https://github.com/canonical/cloud-utils/blob/main/bin/ec2metadata>
#[test]
fn ec2metadata_prints_what_is_served() -> Result<()> {
    let Some(tool) = Installed::find_or_skip("cloud-guest-utils") else { return Ok(()) };
    let lab = Lab::start()?;
    let instance = Instance::default();
    for pod in [&lab.reader, &lab.idle] {
        let placement = [
            ("availability-zone", instance.availability_zone.clone()),
            ("availability-zone-id", instance.availability_zone_id.clone()),
            ("region", instance.region.clone()),
        ];
        expect(&ask(&tool, pod, &[])?, &["unavailable"], &placement)?;
        let region = ask(&tool, pod, &["--region"])?;
        ensure!(region == [&*instance.region], "{region:?}");
    }
    lab.stop()
}

fn ask(tool: &Installed, pod: &Pod, options: &[&str]) -> Result<Vec<String>> {
    let mut command = tool.command();
    command.args(options);
    run(pod, command)?.ok().with_context(|| format!("{} {options:?}", tool.version))
}

/// Checks for the values of the instance, and that what is withheld is as `absent` as the tool says it.
fn expect(lines: &[String], absent: &[&str], placement: &[(&str, String)]) -> Result<()> {
    let printed: BTreeMap<_, _> = lines.iter().filter_map(|line| line.split_once(": ")).collect();
    let instance = Instance::default();
    let hostname = format!("ip-{}.ec2.internal", instance.private_ip.replace('.', "-"));
    let served = [
        ("ami-id", instance.image_id),
        ("instance-id", instance.instance_id),
        ("instance-type", instance.instance_type),
        ("local-hostname", hostname),
    ];
    for (name, value) in served.iter().chain(placement) {
        ensure!(printed.get(name) == Some(&&**value), "{name} is not {value}: {printed:#?}");
    }
    for name in WITHHELD {
        ensure!(printed.get(name).is_some_and(|value| absent.contains(value)), "{name}: {printed:#?}");
    }
    Ok(())
}
