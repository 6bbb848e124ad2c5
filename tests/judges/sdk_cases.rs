//! The shared test cases of AWS's SDKs for instance credentials, seen from the server: the responses to each request,
//! in order. Source:
//! <https://github.com/aws/aws-sdk-ruby/blob/version-3/gems/aws-sdk-core/spec/fixtures/imds/test-cases.json>
//!
//! The cases of a server without `security-credentials-extended` are left out: kirsa always has it.

use anyhow::{Context, Result, ensure};
use lab::http::{Client, Response, TOKEN};
use lab::net::Pod;
use lab::poll::poll;
use lab::site::ACCOUNT;
use lab::sts::Dialect;
use lab::workloads::Workload;
use serde_json::Value;

use super::{Lab, TIMEOUT};

const LEGACY: &str = "/latest/meta-data/iam/security-credentials/";
const EXTENDED: &str = "/latest/meta-data/iam/security-credentials-extended/";
/// Members of every document; the extended one also has `AccountId`.
const MEMBERS: [&str; 7] = ["Code", "LastUpdated", "Type", "AccessKeyId", "SecretAccessKey", "Token", "Expiration"];

fn get(imds: &mut Client, path: &str) -> Result<Response> {
    let token = imds.put_token(21_600)?;
    imds.get(path).header(TOKEN, &token).send()
}

/// Gets the credentials at a path, and checks that they are complete.
fn credentials(imds: &mut Client, path: &str) -> Result<Value> {
    let document = get(imds, path)?.ok().and_then(|body| Ok(serde_json::from_str::<Value>(&body)?));
    let document = document.with_context(|| path.to_owned())?;
    for member in MEMBERS {
        ensure!(document[member].is_string(), "{member}: {document}");
    }
    ensure!(document["Code"] == "Success" && document["Type"] == "AWS-HMAC", "{document}");
    Ok(document)
}

/// Gives a pod a role of any name.
fn give(lab: &Lab, pod: &Pod, arn: &str) -> Result<()> {
    let name = pod.name();
    lab.site.trust(arn, name);
    let token = lab.site.write_token(name, lab.site.issuer.pod_token("default", name, name, name)?)?;
    lab.site.put(Workload::new(pod, name).role(arn, &token))
}

#[test]
fn profile_is_listed_and_has_an_account_id() -> Result<()> {
    let lab = Lab::start()?;
    let mut imds = lab.reader.imds();
    let profile = get(&mut imds, EXTENDED)?.ok()?;
    for _ in 0..2 {
        let document = credentials(&mut imds, &format!("{EXTENDED}{profile}"))?;
        ensure!(document["AccountId"] == ACCOUNT, "{document}");
        ensure!(lab.site.session(&document.to_string())?.role_arn == lab.site.arn("reader"));
    }
    // Older SDKs request the form without an account.
    ensure!(get(&mut imds, LEGACY)?.ok()? == profile);
    let document = credentials(&mut imds, &format!("{LEGACY}{profile}"))?;
    ensure!(document.get("AccountId").is_none(), "{document}");
    lab.stop()
}

#[test]
fn named_profile_needs_no_listing() -> Result<()> {
    let lab = Lab::start()?;
    let document = credentials(&mut lab.reader.imds(), &format!("{EXTENDED}reader-role"))?;
    ensure!(document["AccountId"] == ACCOUNT, "{document}");
    lab.stop()
}

#[test]
fn changed_profile_is_404_until_listed_again() -> Result<()> {
    let lab = Lab::start()?;
    let mut imds = lab.reader.imds();
    credentials(&mut imds, &format!("{EXTENDED}reader-role"))?;
    let other = lab.site.arn("other");
    give(&lab, &lab.reader, &other)?;
    for folder in [EXTENDED, LEGACY] {
        let gone = || get(&mut imds, &format!("{folder}reader-role")).ok().filter(|gone| gone.status == 404);
        poll("the former name to be gone", TIMEOUT, gone)?;
        let profile = get(&mut imds, folder)?.ok()?;
        ensure!(profile == "other-role", "{profile}");
        let document = credentials(&mut imds, &format!("{folder}{profile}"))?;
        ensure!(lab.site.session(&document.to_string())?.role_arn == other, "{document}");
    }
    lab.stop()
}

#[test]
fn invalid_profile_is_404_in_both_forms() -> Result<()> {
    let lab = Lab::start()?;
    for folder in [EXTENDED, LEGACY] {
        let response = get(&mut lab.reader.imds(), &format!("{folder}no-such-profile"))?;
        ensure!(response.status == 404, "{response:?}");
    }
    lab.stop()
}

/// The role of an S3-compatible store belongs to no account.
#[test]
fn role_without_account_has_no_account_id() -> Result<()> {
    let lab = Lab::start()?;
    let arn = "arn:minio:iam:::role/reader";
    let pod = lab.site.stranger("stored")?;
    lab.site.sts.configure(|settings| settings.dialect = Dialect::Minio);
    give(&lab, &pod, arn)?;
    let mut imds = pod.imds();
    let listed = || get(&mut imds, EXTENDED).ok().filter(|list| list.status == 200);
    let profile = poll("the pod to be known", TIMEOUT, listed)?.body;
    let document = credentials(&mut imds, &format!("{EXTENDED}{profile}"))?;
    ensure!(document.get("AccountId").is_none(), "{document}");
    lab.stop()
}
