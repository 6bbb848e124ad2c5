//! aws-sdk-go-v2's own integration tests for an EC2 instance:
//! <https://github.com/aws/aws-sdk-go-v2/blob/main/feature/ec2/imds/integration_test.go> and
//! <https://github.com/aws/aws-sdk-go-v2/blob/main/credentials/ec2rolecreds/integration_test.go>

use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::clients::Installed;
use lab::net::Pod;

use super::{Lab, run};

const IAM_INFO: &str = "TestInteg_GetIAMInfo";
const CREDENTIALS: &str = "TestInteg_RetrieveCredentials";
/// User data often holds the node's bootstrap secrets: kirsa never serves it.
const USER_DATA: &str = "TestInteg_GetUserData";
const OTHERS: [&str; 4] = [
    "TestInteg_GetDynamicData",
    "TestInteg_GetInstanceIdentityDocument",
    "TestInteg_GetMetadata",
    "TestInteg_GetRegion",
];

#[test]
fn go_sdk_tests_pass_but_for_user_data() -> Result<()> {
    let Some(sdk) = Installed::find_or_skip("go2-own-tests") else { return Ok(()) };
    let lab = Lab::start()?;
    let (results, _) = go_test(&sdk, "imds", &lab.reader)?;
    expect(&results, &[&OTHERS[..], &[IAM_INFO]].concat(), &[USER_DATA])?;
    let (results, lines) = go_test(&sdk, "ec2rolecreds", &lab.reader)?;
    expect(&results, &[CREDENTIALS], &[])?;
    let key = lines.iter().find_map(|line| line.split_once("AccessKey: ")).context("the key that it logs")?.1;
    let session = lab.site.sts.session(key).with_context(|| format!("STS issued no {key}"))?;
    ensure!(session.role_arn == lab.site.arn("reader"), "{session:?}");
    lab.stop()
}

#[test]
fn without_role_go_sdk_tests_find_no_profile() -> Result<()> {
    let Some(sdk) = Installed::find_or_skip("go2-own-tests") else { return Ok(()) };
    let lab = Lab::start()?;
    let (results, _) = go_test(&sdk, "imds", &lab.idle)?;
    expect(&results, &OTHERS, &[IAM_INFO, USER_DATA])?;
    let (results, _) = go_test(&sdk, "ec2rolecreds", &lab.idle)?;
    expect(&results, &[], &[CREDENTIALS])?;
    lab.stop()
}

/// Test names and whether they passed.
type Results = Vec<(String, bool)>;

/// Runs a package's integration tests. Returns their results and their output.
fn go_test(sdk: &Installed, package: &str, pod: &Pod) -> Result<(Results, Vec<String>)> {
    let mut command = Command::new(sdk.folder.join(format!("{package}.test")));
    command.env_clear().env("AWS_TEST_EC2_IMDS_WITH_USER_DATA", "true");
    command.args(["-test.v", "-test.run", "^TestInteg_"]);
    let lines = run(pod, command)?.lines;
    let result = |line: &String| {
        let (name, passed) = line
            .strip_prefix("--- PASS: ")
            .map(|name| (name, true))
            .or_else(|| line.strip_prefix("--- FAIL: ").map(|name| (name, false)))?;
        Some((name.split(' ').next()?.to_owned(), passed))
    };
    Ok((lines.iter().filter_map(result).collect(), lines))
}

/// Checks that exactly these tests passed and failed.
fn expect(results: &Results, pass: &[&str], fail: &[&str]) -> Result<()> {
    let mut found = results.clone();
    found.sort();
    let all = pass.iter().map(|name| (*name, true)).chain(fail.iter().map(|name| (*name, false)));
    let mut expected: Vec<_> = all.map(|(name, passed)| (name.to_owned(), passed)).collect();
    expected.sort();
    ensure!(found == expected, "found {found:#?}, expected {expected:#?}");
    Ok(())
}
