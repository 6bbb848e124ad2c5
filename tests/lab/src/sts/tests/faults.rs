//! Everything that can be made to go wrong, and that it ends again.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use aws_smithy_http_client::tls::{self, TlsContext, TrustStore, rustls_provider::CryptoMode};
use tokio::time::Instant;

use super::*;

const WRITER: &str = "arn:aws:iam::111122223333:role/writer";

fn good_form() -> String {
    let token = ISSUER.pod_token("default", "reader", "reader-0", "uid-0").expect("a token");
    form_urlencoded::Serializer::new(String::new())
        .extend_pairs([
            ("Action", "AssumeRoleWithWebIdentity"),
            ("Version", "2011-06-15"),
            ("RoleArn", READER),
            ("RoleSessionName", "default.reader"),
            ("WebIdentityToken", &token),
        ])
        .finish()
}

/// Sends a good request by hand and returns the connection.
fn connect(sts: &StandIn) -> TcpStream {
    let mut stream = TcpStream::connect(sts.address()).expect("a connection");
    stream.write_all(request("POST", "/", &good_form()).as_bytes()).expect("a request");
    stream
}

#[tokio::test]
async fn every_code_can_be_asked_for() {
    let sts = start();
    for (code, status) in [
        ("InvalidIdentityToken", 400),
        ("ExpiredTokenException", 400),
        ("AccessDenied", 403),
        ("MalformedPolicyDocument", 400),
        ("PackedPolicyTooLarge", 400),
        ("IDPRejectedClaim", 403),
        ("IDPCommunicationError", 400),
        ("Throttling", 400),
        ("RegionDisabledException", 403),
        ("SomethingNew", 400),
    ] {
        sts.inject(Fault::next(1, Effect::error(code)));
        refuse(&sts, |ask| ask).await.is(status, code, "");
        assert_eq!(sts.calls().last().and_then(|c| c.outcome.clone()), Some(Outcome::Refused { code: code.into() }));
        assume(&sts, |ask| ask).await.expect("healed");
    }
    sts.inject(Fault::next(1, Effect::Status(503)));
    refuse(&sts, |ask| ask).await.is(503, "ServiceUnavailable", "");
    sts.inject(Fault::next(1, Effect::Status(500)));
    refuse(&sts, |ask| ask).await.is(500, "InternalFailure", "");
}

#[tokio::test]
async fn faults_are_counted_and_kept_to_their_role() {
    let sts = start();
    sts.set_role(Role::trusting(WRITER, ISSUER.url(), &reader()));
    sts.inject(Fault::next(2, Effect::error("Throttling")).of_role(WRITER));
    assume(&sts, |ask| ask).await.expect("another role is not hit");
    for _ in 0..2 {
        refuse(&sts, |ask| ask.role_arn(WRITER)).await.is(400, "Throttling", "Rate exceeded");
    }
    assume(&sts, |ask| ask.role_arn(WRITER)).await.expect("the fault is over");

    sts.inject(Fault::one_in(3, Effect::error("AccessDenied")));
    let mut denied = 0;
    for _ in 0..9 {
        denied += usize::from(assume(&sts, |ask| ask).await.is_err());
    }
    assert_eq!(denied, 3);
    sts.heal();
    sts.inject(Fault::always(Effect::error("AccessDenied")));
    for _ in 0..3 {
        refuse(&sts, |ask| ask).await.is(403, "AccessDenied", "");
    }
    sts.heal();
    assume(&sts, |ask| ask).await.expect("healed");
}

#[tokio::test]
async fn a_delay_comes_before_the_answer() {
    let sts = start();
    sts.inject(Fault::next(1, Effect::delay(Duration::from_millis(300))));
    let start = Instant::now();
    assume(&sts, |ask| ask).await.expect("a session");
    assert!(start.elapsed() >= Duration::from_millis(300));
}

#[test]
fn no_answer_is_none_until_the_client_gives_up() {
    let sts = start();
    sts.inject(Fault::next(1, Effect::NoAnswer));
    let mut stream = connect(&sts);
    let calls = sts.wait_for_outcomes(1, DEADLINE).expect("a call");
    assert_eq!(calls[0].outcome, Some(Outcome::Spoilt));
    stream.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
    let error = stream.read(&mut [0]).expect_err("nothing to read");
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
}

#[test]
fn a_reset_is_a_reset() {
    let sts = start();
    sts.inject(Fault::next(1, Effect::Reset));
    let error = connect(&sts).read(&mut [0]).expect_err("a reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn half_an_answer_is_shorter_than_it_says() {
    let sts = start();
    sts.inject(Fault::next(1, Effect::HalfAnswer));
    let mut stream = connect(&sts);
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let announced = head.lines().find_map(|line| line.strip_prefix("content-length: ")).expect("a length");
    let announced: usize = announced.parse().expect("a length");
    assert!(body.len() > 100 && body.len() <= announced / 2, "{} of {announced}", body.len());
}

/// The SDK makes up what a truncated answer lacks: whoever uses it has to look at what it was given.
#[tokio::test]
async fn a_truncated_answer_looks_like_one() {
    let sts = start();
    sts.inject(Fault::next(1, Effect::TruncatedXml));
    let output = assume(&sts, |ask| ask).await.expect("what passes for an answer");
    let issued = output.credentials().expect("what passes for credentials");
    let kept = sts.session(issued.access_key_id()).expect("a session");
    assert_eq!(issued.expiration().secs(), 0);
    assert!(kept.session_token.starts_with(issued.session_token()) && kept.session_token != issued.session_token());
}

#[tokio::test]
async fn an_answer_may_lack_its_credentials() {
    let sts = start();
    sts.inject(Fault::next(1, Effect::NoCredentials));
    let output = assume(&sts, |ask| ask).await.expect("an answer");
    assert!(output.credentials().is_none() && output.audience().is_some(), "{output:?}");
}

#[tokio::test]
async fn malformed_xml_is_no_answer() {
    let sts = start();
    sts.inject(Fault::next(1, Effect::MalformedXml));
    let token = ISSUER.pod_token("default", "reader", "reader-0", "uid-0").expect("a token");
    let ask = client(&sts).assume_role_with_web_identity().role_arn(READER).role_session_name("default.reader");
    let error = ask.web_identity_token(token).send().await.expect_err("no answer");
    assert!(matches!(error, SdkError::ResponseError(_) | SdkError::ServiceError(_)), "{error:?}");
    let (head, body) = exchange(sts.address(), "POST", "/", &good_form());
    assert!(head.starts_with("HTTP/1.1 200 ") && body.ends_with("</AssumeRoleWithWebIdentityResponse>\n"), "{body}");
}

#[tokio::test]
async fn another_clock_shifts_expiration_and_date() {
    let sts = start();
    sts.configure(|settings| settings.clock_skew_seconds = 3600);
    let now = jiff::Timestamp::now().as_second();
    let output = assume(&sts, |ask| ask.duration_seconds(900)).await.expect("a session");
    let left = output.credentials().expect("credentials").expiration().secs() - now;
    assert!((4500..4510).contains(&left), "{left}");
    let (head, _) = exchange(sts.address(), "POST", "/", &good_form());
    let date = head.lines().find_map(|line| line.strip_prefix("date: ")).expect("a date");
    let date = jiff::fmt::rfc2822::parse(date).expect("a date").timestamp().as_second();
    assert!((3600..3610).contains(&(date - now)), "{date}");
}

#[tokio::test]
async fn a_certificate_is_worth_its_names() {
    for (name, accepted) in [("127.0.0.1", true), ("sts.example", false)] {
        let tls = Tls::for_names(&[name]).expect("a certificate");
        let authority = tls.authority_pem().as_bytes().to_owned();
        let sts = start_with(Config { tls: Some(tls), ..Config::default() });
        let trust = TlsContext::builder().with_trust_store(TrustStore::empty().with_pem_certificate(authority));
        let http = aws_smithy_http_client::Builder::new()
            .tls_provider(tls::Provider::Rustls(CryptoMode::AwsLc))
            .tls_context(trust.build().expect("a context"))
            .build_https();
        let client = client_with(&sts, |config| config.http_client(http));
        let error = client.assume_role_with_web_identity().send().await.expect_err("an empty request");
        assert_eq!(matches!(error, SdkError::ServiceError(_)), accepted, "{error:?}");
        assert_eq!(sts.calls().len(), usize::from(accepted));
    }
}
