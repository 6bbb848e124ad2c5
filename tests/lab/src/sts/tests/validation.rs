//! Requests that are refused for their form, whoever asks.

use super::*;

const POLICY: &str = r#"{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"s3:Get*","Resource":"*"}]}"#;

#[tokio::test]
async fn session_names_have_a_grammar() {
    let sts = start();
    let too_long = "a".repeat(65);
    for (name, constraint) in [
        ("a", "length greater than or equal to 2"),
        (too_long.as_str(), "length less than or equal to 64"),
        ("system:node", r"pattern: [\w+=,.@-]*"),
        ("ns/sa", "pattern"),
        ("ns.größe", "pattern"),
    ] {
        let refused = refuse(&sts, |ask| ask.role_session_name(name)).await;
        refused.is(400, "ValidationError", constraint);
        refused.is(400, "ValidationError", "1 validation error detected: Value '");
    }
    let most = "a_+=,.@-".repeat(8);
    assume(&sts, |ask| ask.role_session_name(most)).await.expect("64 characters of the grammar");
}

#[tokio::test]
async fn every_violation_is_named() {
    let refused = refuse(&start(), |ask| ask.role_session_name("/").duration_seconds(60)).await;
    refused.is(400, "ValidationError", "3 validation errors detected");
}

#[tokio::test]
async fn durations_have_bounds() {
    let sts = start();
    refuse(&sts, |ask| ask.duration_seconds(899)).await.is(400, "ValidationError", "greater than or equal to 900");
    refuse(&sts, |ask| ask.duration_seconds(43201)).await.is(400, "ValidationError", "less than or equal to 43200");
    let own_bound = "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.";
    refuse(&sts, |ask| ask.duration_seconds(3601)).await.is(400, "ValidationError", own_bound);
    sts.set_role(Role::trusting(READER, ISSUER.url(), &reader()).max_session_duration(7200));
    assume(&sts, |ask| ask.duration_seconds(7200)).await.expect("a longer session");
    assume(&sts, |ask| ask.duration_seconds(900)).await.expect("a short session");
}

#[tokio::test]
async fn role_arns_have_a_grammar() {
    let sts = start();
    for arn in [
        "arn:aws:iam:::role/without-account",
        "arn:aws:iam::1111:role/short-account",
        "arn:aws:iam::111122223333:user/reader",
        "arn:aws:s3::111122223333:role/reader",
        "arn:aws:iam::111122223333:role/",
        "reader-reader-reader-reader",
    ] {
        refuse(&sts, |ask| ask.role_arn(arn)).await.is(400, "ValidationError", "Request ARN is invalid");
    }
}

#[tokio::test]
#[expect(deprecated, reason = "STS still answers with the packed size")]
async fn policies_are_read() {
    let sts = start();
    for policy in ["{", "[]", r#"{"Version":"2012-10-17"}"#, r#"{"Statement":[{"Effect":"Allow"}]}"#] {
        refuse(&sts, |ask| ask.policy(policy)).await.is(400, "MalformedPolicyDocument", "Syntax errors in policy");
    }
    let output = assume(&sts, |ask| ask.policy(POLICY)).await.expect("a session");
    assert_eq!(output.packed_policy_size(), Some(5));
    assert_eq!(sts.calls().last().and_then(|call| call.policy.clone()).as_deref(), Some(POLICY));
}

#[tokio::test]
async fn policies_have_bounds() {
    let sts = start();
    let padded = format!("{POLICY}{}", " ".repeat(2049 - POLICY.len()));
    refuse(&sts, |ask| ask.policy(padded)).await.is(400, "ValidationError", "less than or equal to 2048");
    // Both kinds of policy share one allotment, which eight such ARNs exceed together with an inline one.
    let arn = |n: usize| policy_arn(&format!("arn:aws:iam::111122223333:policy/{n}/{}", "p".repeat(220)));
    let refused = refuse(&sts, |ask| ask.policy(POLICY).set_policy_arns(Some((0..8).map(arn).collect()))).await;
    refused.is(400, "PackedPolicyTooLarge", "of allotted space");
}

#[tokio::test]
async fn policy_arns_have_a_grammar_and_a_number() {
    let sts = start();
    let good = "arn:aws:iam::aws:policy/ReadOnlyAccess";
    for arn in ["arn:aws:iam::aws:role/ReadOnlyAccess", "arn:aws:iam::policy/x", "ReadOnlyAccess"] {
        refuse(&sts, |ask| ask.policy_arns(policy_arn(arn))).await.is(400, "ValidationError", "is not valid");
    }
    let many = |count| Some(vec![policy_arn(good); count]);
    refuse(&sts, |ask| ask.set_policy_arns(many(11))).await.is(400, "ValidationError", "less than or equal to 10");
    assume(&sts, |ask| ask.set_policy_arns(many(10))).await.expect("a session");
    assert_eq!(sts.calls().last().map(|call| call.policy_arns.len()), Some(10));
}

#[tokio::test]
async fn minio_names_nobody_and_refuses_all_alike() {
    let arn = "arn:minio:iam:::role/nOybJqMNzNmroqEKq5D0EUsRZw0";
    let sts = start();
    sts.configure(|settings| settings.dialect = Dialect::Minio);
    sts.set_role(Role::trusting(arn, ISSUER.url(), &reader()));
    let output = assume(&sts, |ask| ask.role_arn(arn)).await.expect("a session");
    assert_eq!(output.assumed_role_user().map(|user| user.arn()), Some(""));
    assert!(output.credentials().is_some());
    let refused = refuse(&sts, |ask| ask.role_arn("arn:minio:iam:::role/other")).await;
    refused.is(400, "InvalidParameterValue", "Not authorized");
}

/// Such an answer, cut short, passes for a good one: only the session token is not whole.
#[tokio::test]
async fn ceph_takes_roles_without_an_account_and_puts_the_token_last() {
    let arn = "arn:aws:iam:::role/reader";
    let sts = start();
    sts.configure(|settings| settings.dialect = Dialect::Ceph);
    sts.set_role(Role::trusting(arn, ISSUER.url(), &reader()));
    assume(&sts, |ask| ask.role_arn(arn)).await.expect("a session");
    sts.inject(Fault::next(1, Effect::TruncatedXml));
    let output = assume(&sts, |ask| ask.role_arn(arn)).await.expect("what passes for an answer");
    let issued = output.credentials().expect("what passes for credentials");
    let kept = sts.session(issued.access_key_id()).expect("a session");
    assert_eq!(issued.expiration().secs(), kept.expiration.as_second());
    assert!(kept.session_token.starts_with(issued.session_token()) && kept.session_token != issued.session_token());
}
