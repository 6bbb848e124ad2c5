//! Command-line tools in Debian that print an instance's metadata.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use lab::clients::Installed;
use lab::imds::Instance;
use lab::net::Pod;

use super::{Lab, run};

/// Never served: user data, and details of the instance, its image and its addresses.
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

/// Amazon Linux's tool. It requests some documents with two slashes, and prints "not available" for any error.
/// Source: <https://github.com/amazonlinux/amazon-ec2-utils/blob/main/ec2-metadata>
#[test]
fn ec2_metadata_prints_what_is_served() -> Result<()> {
    let Some(tool) = Installed::find_or_skip("amazon-ec2-utils") else { return Ok(()) };
    let lab = Lab::start()?;
    for pod in [&lab.reader, &lab.idle] {
        let zone = ("placement", Instance::default().availability_zone);
        let lines = print(&tool, pod, &[])?;
        // A folder has its own line before its entries or "not available".
        expect(&lines, &["not available", ""], &[zone])?;
        ensure!(!lines.iter().any(|line| line.starts_with([' ', '\t']) || line.starts_with("keyname")), "{lines:#?}");
    }
    // The documents that it requests with two slashes are not served; this one is, with two slashes.
    let id = lab.reader.imds().get("/latest//meta-data/instance-id").send()?.ok()?;
    ensure!(id == Instance::default().instance_id, "{id}");
    for (option, line) in [("--instance-id", "instance-id: i-"), ("--ramdisk-id", "ramdisk-id: not available")] {
        let lines = print(&tool, &lab.reader, &[option])?;
        ensure!(lines.len() == 1 && lines[0].starts_with(line), "{option}: {lines:?}");
    }
    lab.stop()
}

/// Canonical's tool, which requests the version of 2009. It exits at any error but 404.
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
        expect(&print(&tool, pod, &[])?, &["unavailable"], &placement)?;
        let region = print(&tool, pod, &["--region"])?;
        ensure!(region == [&*instance.region], "{region:?}");
    }
    lab.stop()
}

fn print(tool: &Installed, pod: &Pod, options: &[&str]) -> Result<Vec<String>> {
    let mut command = tool.command();
    command.args(options);
    run(pod, command)?.ok().with_context(|| format!("{} {options:?}", tool.version))
}

/// Checks the values of the instance, and that withheld ones have one of the texts that the tool prints if they are
/// `absent`.
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
