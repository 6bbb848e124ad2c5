//! The paths and statuses that the tests of amazon-ec2-metadata-mock specify. AWS publishes it as a mock of an
//! instance's metadata service. Sources:
//! - <https://github.com/aws/amazon-ec2-metadata-mock/blob/main/test/e2e/golden/default/latest/meta-data/index.golden>
//! - <https://github.com/aws/amazon-ec2-metadata-mock/blob/main/test/e2e/golden/dynamic/index.golden>
//! - <https://github.com/aws/amazon-ec2-metadata-mock/blob/main/test/e2e/golden/dynamic/instance-identity.golden>
//! - <https://github.com/aws/amazon-ec2-metadata-mock/blob/main/test/e2e/cmd/root-test>
//! - <https://github.com/aws/amazon-ec2-metadata-mock/blob/main/test/e2e/cmd/imdsv2-test>

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::http::{Client, TOKEN, TOKEN_TTL};
use lab::poll::poll;

use super::Lab;

/// How kirsa treats a path that the mock has.
#[derive(PartialEq)]
enum Treatment {
    Served,
    /// 404, for this reason.
    Withheld(&'static str),
}
use Treatment::{Served, Withheld};

const SECRET: Treatment = Withheld("proves the node's identity, or holds bootstrap secrets");
const NODES_OWN: Treatment = Withheld("describes the node; no pod needs it to find its region or to detect EC2");
const ON_REQUEST: Treatment = Withheld("served if --node-metadata allows the path or its group");

const ROOT: &[(&str, Treatment)] = &[
    ("ami-id", Served),
    ("ami-launch-index", NODES_OWN),
    ("ami-manifest-path", NODES_OWN),
    ("autoscaling/", ON_REQUEST),
    ("block-device-mapping/", ON_REQUEST),
    ("elastic-inference/", NODES_OWN),
    ("events/", ON_REQUEST),
    ("hostname", Served),
    ("iam/", Served),
    ("instance-action", NODES_OWN),
    ("instance-id", Served),
    ("instance-life-cycle", ON_REQUEST),
    ("instance-type", Served),
    ("kernel-id", NODES_OWN),
    ("local-hostname", Served),
    ("local-ipv4", ON_REQUEST),
    ("mac", ON_REQUEST),
    ("network/", ON_REQUEST),
    ("placement/", Served),
    ("product-codes", NODES_OWN),
    ("public-hostname", ON_REQUEST),
    ("public-ipv4", ON_REQUEST),
    ("public-keys/", SECRET),
    ("ramdisk-id", NODES_OWN),
    ("reservation-id", NODES_OWN),
    ("security-groups", NODES_OWN),
    ("services/", Served),
    ("spot/", ON_REQUEST),
    ("tags/", ON_REQUEST),
];
const DYNAMIC: &[(&str, Treatment)] = &[("fws/", NODES_OWN), ("instance-identity/", Served)];
const IDENTITY: &[(&str, Treatment)] = &[("document", Served), ("pkcs7", SECRET), ("signature", SECRET)];
/// Longer than the minimum TTL of a token.
const EXPIRY: Duration = Duration::from_secs(10);

#[test]
fn mock_paths_are_served_or_withheld() -> Result<()> {
    let lab = Lab::start()?;
    let mut imds = lab.reader.imds();
    let token = imds.put_token(21_600)?;
    let mut get = |path: &str| imds.get(path).header(TOKEN, &token).send();
    for (folder, entries) in
        [("/latest/meta-data", ROOT), ("/latest/dynamic", DYNAMIC), ("/latest/dynamic/instance-identity", IDENTITY)]
    {
        let served = entries.iter().filter(|(_, treatment)| *treatment == Served);
        let expected = served.map(|(entry, _)| *entry).collect::<Vec<_>>().join("\n");
        let listing = get(folder)?.ok()?;
        ensure!(listing == expected, "{folder}: {listing:?}");
        for (entry, treatment) in entries {
            let response = get(&format!("{folder}/{entry}"))?;
            match treatment {
                Served => ensure!(response.status == 200 && !response.body.is_empty(), "{entry}: {response:?}"),
                Withheld(reason) => ensure!(response.status == 404, "{entry} ({reason}): {response:?}"),
            }
        }
    }
    let versions = get("/")?.ok()?;
    ensure!(versions.lines().any(|version| version == "latest"), "{versions:?}");
    ensure!(get("/womp")?.status == 404);
    let document = get("/latest/dynamic/instance-identity/document")?.json()?;
    for member in ["accountId", "instanceId", "marketplaceProductCodes"] {
        ensure!(document.get(member).is_some(), "{member}: {document}");
    }
    lab.stop()
}

#[test]
fn mock_imdsv2_statuses_are_served() -> Result<()> {
    let lab = Lab::start()?;
    let strict = lab.site.stranger("strict")?;
    lab.site.put(lab.site.with_role(&strict)?.annotation("kirsa.dev/require-imdsv2", "true"))?;
    let mut imds = strict.imds();
    let status =
        |imds: &mut Client, token| anyhow::Ok(imds.get("/latest/meta-data").header(TOKEN, token).send()?.status);
    let token = imds.put_token(21_600)?;
    poll("the pod to be known", EXPIRY, || imds.get("/latest/meta-data").send().ok().filter(|no| no.status == 401))?;
    ensure!(status(&mut imds, &token)? == 200);
    ensure!(status(&mut imds, "AQAEnosuchtoken")? == 401);
    let refused = imds.put("/latest/api/token").header(TOKEN_TTL, "0").send()?;
    ensure!(refused.status == 400, "{refused:?}");
    let short = imds.put_token(1)?;
    poll("the token to expire", EXPIRY, || status(&mut imds, &short).ok().filter(|status| *status == 401))?;
    lab.stop()
}
