//! Credentials presented back.

use aws_smithy_async::time::{SharedTimeSource, StaticTimeSource};

use super::*;

#[tokio::test]
async fn issued_credentials_name_their_role_and_session() {
    let sts = start();
    let issued = credentials(&assume(&sts, |ask| ask).await.expect("a session"));
    let arn = identity(&sts, issued).await.expect("an identity");
    assert_eq!(arn, "arn:aws:sts::111122223333:assumed-role/reader/default.reader");
}

#[tokio::test]
async fn a_wrong_secret_does_not_match() {
    let sts = start();
    let issued = credentials(&assume(&sts, |ask| ask).await.expect("a session"));
    let token = issued.session_token().map(str::to_owned);
    let forged = Credentials::new(issued.access_key_id(), "x".repeat(40), token, None, "test");
    identity(&sts, forged).await.expect_err("a refusal").is(403, "SignatureDoesNotMatch", "does not match");
}

#[tokio::test]
async fn unknown_keys_and_foreign_tokens_are_invalid() {
    let sts = start();
    let first = credentials(&assume(&sts, |ask| ask).await.expect("a session"));
    let second = credentials(&assume(&sts, |ask| ask).await.expect("a session"));
    for (key, token) in [
        ("ASIAAAAAAAAAAAAAAAAA", first.session_token()),
        (first.access_key_id(), second.session_token()),
        (first.access_key_id(), None),
    ] {
        let wrong = Credentials::new(key, first.secret_access_key(), token.map(str::to_owned), None, "test");
        let refused = identity(&sts, wrong).await.expect_err("a refusal");
        refused.is(403, "InvalidClientTokenId", "security token included in the request is invalid");
    }
}

#[tokio::test]
async fn expired_sessions_are_refused() {
    let sts = start();
    let issued = credentials(&assume(&sts, |ask| ask).await.expect("a session"));
    sts.expire_sessions();
    identity(&sts, issued).await.expect_err("a refusal").is(403, "ExpiredToken", "is expired");
    sts.configure(|settings| settings.session_seconds = Some(0));
    let dead = credentials(&assume(&sts, |ask| ask).await.expect("a session"));
    identity(&sts, dead).await.expect_err("a refusal").is(403, "ExpiredToken", "is expired");
}

#[tokio::test]
async fn a_signature_does_not_keep() {
    let sts = start();
    let issued = credentials(&assume(&sts, |ask| ask).await.expect("a session"));
    let a_quarter_ago = jiff::Timestamp::now().as_second() - 900;
    let clock = SharedTimeSource::new(StaticTimeSource::from_secs(a_quarter_ago.cast_unsigned()));
    let late = client_with(&sts, |config| config.credentials_provider(issued).time_source(clock));
    let refused = Refused::of(late.get_caller_identity().send().await.expect_err("a refusal"));
    refused.is(403, "SignatureDoesNotMatch", "Signature expired");
}

#[tokio::test]
async fn unsigned_and_unknown_requests_are_refused() {
    let sts = start();
    for (form, status, code) in [
        ("Action=GetCallerIdentity&Version=2011-06-15", 403, "MissingAuthenticationToken"),
        ("Action=GetFederationToken&Version=2011-06-15", 400, "InvalidAction"),
        ("Action=AssumeRoleWithWebIdentity", 400, "InvalidAction"),
        ("", 403, "MissingAuthenticationToken"),
    ] {
        let (head, body) = exchange(sts.address(), "POST", "/", form);
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{form}: {head}");
        assert!(head.contains("x-amzn-requestid: ") && head.contains("content-type: text/xml"), "{head}");
        assert!(body.contains(&format!("<Code>{code}</Code>")), "{form}: {body}");
    }
}
