//! Python programs that read all metadata that is listed.

use anyhow::{Context, Result, ensure};
use lab::clients::Installed;
use lab::imds::Instance;
use lab::poll::poll;
use lab::site::ACCOUNT;
use serde_json::{Value, json};

use super::{Lab, TIMEOUT, run};

/// cloud-init fetches every listed entry, and discards all of them if one document fails.
/// Source: <https://github.com/canonical/cloud-init/blob/main/cloudinit/sources/DataSourceEc2.py>
#[test]
fn cloud_init_finds_all_that_is_listed() -> Result<()> {
    let Some(tool) = Installed::find_or_skip("cloud-init") else { return Ok(()) };
    let lab = Lab::start()?;
    let instance = Instance::default();
    for (pod, account) in [(&lab.reader, ACCOUNT), (&lab.idle, "")] {
        let found = last_line(run(pod, tool.command())?.ok()?)?;
        let metadata = &found["meta-data"];
        ensure!(metadata["instance-id"] == instance.instance_id, "{found:#}");
        ensure!(metadata["ami-id"] == instance.image_id, "{found:#}");
        ensure!(metadata["placement"]["availability-zone-id"] == instance.availability_zone_id, "{found:#}");
        let document = &found["dynamic"]["instance-identity"]["document"];
        ensure!(document["region"] == instance.region && document["accountId"] == account, "{found:#}");
        // Often holds the node's bootstrap secrets.
        ensure!(found["user-data"] == "", "{found:#}");
        let profile = metadata["iam"]["info"]["InstanceProfileArn"].as_str();
        let own = format!("arn:aws:iam::{ACCOUNT}:instance-profile/reader-role");
        ensure!(profile == (!account.is_empty()).then_some(&*own), "{found:#}");
    }
    lab.stop()
}

/// If `iam/info` is refused, it is not listed, and the rest is found.
#[test]
fn cloud_init_finds_the_rest_without_usable_role() -> Result<()> {
    let Some(tool) = Installed::find_or_skip("cloud-init") else { return Ok(()) };
    let lab = Lab::start()?;
    let wrong = lab.site.stranger("wrong")?;
    lab.site.put(lab.site.with_role(&wrong)?.annotation("kirsa.dev/session-policy", "nonsense"))?;
    let failing = || wrong.imds().get("/latest/meta-data/iam/info").send().ok().filter(|info| info.status == 403);
    poll("the role to be known", TIMEOUT, failing)?;
    let found = last_line(run(&wrong, tool.command())?.ok()?)?;
    ensure!(found["meta-data"]["instance-id"] == Instance::default().instance_id, "{found:#}");
    ensure!(found["meta-data"]["iam"] == Value::Null, "{found:#}");
    lab.stop()
}

/// A 503 fails one document, and with it all documents, after the retries of cloud-init.
#[test]
fn cloud_init_ends_in_a_pod_that_is_not_known() -> Result<()> {
    let Some(tool) = Installed::find_or_skip("cloud-init") else { return Ok(()) };
    let lab = Lab::start()?;
    let stranger = lab.site.stranger("stranger")?;
    let found = last_line(run(&stranger, tool.command())?.ok()?)?;
    ensure!(found["meta-data"] == json!({}), "{found:#}");
    lab.stop()
}

/// Source: <https://github.com/adamchainz/ec2-metadata/blob/main/src/ec2_metadata/__init__.py>
#[test]
fn ec2_metadata_package_reads_what_is_served() -> Result<()> {
    let Some(package) = Installed::find_or_skip("ec2-metadata") else { return Ok(()) };
    let lab = Lab::start()?;
    let read = |pod| last_line(run(pod, package.python("with_ec2_metadata.py"))?.ok()?);
    let (reader, idle) = (read(&lab.reader)?, read(&lab.idle)?);
    let Instance { region, availability_zone, image_id, instance_id, instance_type, .. } = Instance::default();
    for found in [&reader, &idle] {
        ensure!(found["region"] == region && found["availability_zone"] == availability_zone, "{found:#}");
        ensure!(found["ami_id"] == image_id && found["instance_id"] == instance_id, "{found:#}");
        ensure!(found["instance_type"] == instance_type, "{found:#}");
        ensure!(found["partition"] == "aws" && found["domain"] == "amazonaws.com", "{found:#}");
        // Documents that an instance may lack: the package accepts a 404 for them.
        for name in ["kernel_id", "public_hostname", "public_ipv4", "spot_instance_action", "user_data"] {
            ensure!(found[name] == Value::Null, "{name}: {found:#}");
        }
        ensure!(found["public_keys"] == json!({}), "{found:#}");
        // Documents that every instance has: they describe the node, and no pod needs them.
        for name in ["ami_launch_index", "reservation_id", "security_groups"] {
            ensure!(found[name].as_str().is_some_and(|error| error.contains("HTTP 404")), "{name}: {found:#}");
        }
    }
    ensure!(reader["account_id"] == ACCOUNT && reader["instance_profile_name"] == "reader-role", "{reader:#}");
    let key = reader["iam_security_credentials"]["AccessKeyId"].as_str().context("an access key id")?;
    let session = lab.site.sts.session(key).with_context(|| format!("STS issued no {key}"))?;
    ensure!(session.role_arn == lab.site.arn("reader"), "{session:?}");
    ensure!(idle["account_id"] == "" && idle["iam_security_credentials"] == Value::Null, "{idle:#}");
    lab.stop()
}

/// Parses the last line of the output as JSON; warnings may precede it.
pub(super) fn last_line(lines: Vec<String>) -> Result<Value> {
    let line = lines.last().context("nothing printed")?;
    serde_json::from_str(line).with_context(|| format!("{lines:#?}"))
}
