//! Which tokens are believed, and which role trusts them.

use serde_json::{Value, json};

use super::*;

async fn refuse_token(sts: &StandIn, token: String) -> Refused {
    refuse(sts, |ask| ask.web_identity_token(token)).await
}

#[tokio::test]
async fn a_good_token_is_worth_a_session_of_the_role() {
    let sts = start();
    let before = jiff::Timestamp::now().as_second();
    let output = assume(&sts, |ask| ask.duration_seconds(1800)).await.expect("a session");
    let user = output.assumed_role_user().expect("a user");
    assert_eq!(user.arn(), "arn:aws:sts::111122223333:assumed-role/reader/default.reader");
    assert!(user.assumed_role_id().starts_with("AROA") && user.assumed_role_id().ends_with(":default.reader"));
    assert_eq!(output.subject_from_web_identity_token(), Some("system:serviceaccount:default:reader"));
    assert_eq!(output.audience(), Some("sts.amazonaws.com"));
    assert_eq!(output.provider(), Some("arn:aws:iam::111122223333:oidc-provider/issuer.example/cluster"));
    let issued = output.credentials().expect("credentials");
    assert!(issued.access_key_id().starts_with("ASIA") && issued.access_key_id().len() == 20);
    assert_eq!(issued.secret_access_key().len(), 40);
    assert!((1800..=1805).contains(&(issued.expiration().secs() - before)), "{:?}", issued.expiration());

    let [call] = &sts.calls_for(READER)[..] else { panic!("one call") };
    let claims = call.claims.as_ref().expect("claims");
    let pod = claims.kubernetes.as_ref().and_then(|k| k.pod.as_ref()).expect("a pod");
    assert_eq!((pod.name.as_str(), pod.uid.as_str()), ("reader-0", "uid-0"));
    assert_eq!(call.outcome, Some(Outcome::Issued { access_key_id: issued.access_key_id().to_owned() }));
    assert_eq!(sts.session(issued.access_key_id()).expect("a session").claims, *claims);
}

#[tokio::test]
async fn rsa_is_believed_too() {
    let issuer = Issuer::new("https://rsa.example").expect("an issuer");
    let sts = start();
    sts.set_provider(Provider::new(issuer.url(), Keys::Given(issuer.jwks().expect("a key set"))));
    sts.set_role(Role::trusting(READER, issuer.url(), &reader()));
    let token = issuer.mint(&reader(), issuer::AUDIENCE, 600, Value::Null).expect("a token");
    assume(&sts, |ask| ask.web_identity_token(token)).await.expect("a session");
    refuse_token(&sts, issuer.tampered(&reader()).expect("a token")).await.is(400, "InvalidIdentityToken", "signature");
}

#[tokio::test]
async fn what_is_no_token_is_said_to_be_none() {
    let sts = start();
    for token in ["abcd", "a.b.c", "e30.e30.", "e30.e30.e30.e30"] {
        refuse_token(&sts, token.to_owned()).await.is(400, "InvalidIdentityToken", "not a valid JWT");
    }
    assert!(sts.calls().iter().all(|call| call.claims.is_none()));
}

#[tokio::test]
async fn an_unknown_issuer_has_no_provider() {
    let sts = start();
    let stranger = Issuer::with_elliptic_curve("https://elsewhere.example").expect("an issuer");
    let token = stranger.mint(&reader(), issuer::AUDIENCE, 600, Value::Null).expect("a token");
    let refused = refuse_token(&sts, token).await;
    refused.is(400, "InvalidIdentityToken", "No OpenIDConnect provider found in your account for https://elsewhere");
}

#[tokio::test]
async fn an_unknown_key_cannot_be_retrieved() {
    let sts = start();
    let impostor = Issuer::with_elliptic_curve(ISSUER.url()).expect("an issuer");
    let token = impostor.mint(&reader(), issuer::AUDIENCE, 600, Value::Null).expect("a token");
    refuse_token(&sts, token).await.is(400, "InvalidIdentityToken", "Couldn't retrieve verification key");
}

#[tokio::test]
async fn a_tampered_token_is_not_believed() {
    let refused = refuse_token(&start(), ISSUER.tampered(&reader()).expect("a token")).await;
    refused.is(400, "InvalidIdentityToken", "signature");
}

#[tokio::test]
async fn a_token_without_a_signature_is_not_believed() {
    let token = ISSUER.mint(&reader(), issuer::AUDIENCE, 600, Value::Null).expect("a token");
    let (message, _) = token.rsplit_once('.').expect("three parts");
    refuse_token(&start(), format!("{message}.")).await.is(400, "InvalidIdentityToken", "signature");
}

#[tokio::test]
async fn an_expired_token_has_a_code_of_its_own() {
    let refused = refuse_token(&start(), ISSUER.expired(&reader()).expect("a token")).await;
    refused.is(400, "ExpiredTokenException", "must be before the expiration date/time");
}

#[tokio::test]
async fn a_token_from_the_future_is_refused() {
    let in_an_hour = jiff::Timestamp::now().as_second() + 3600;
    for claim in ["nbf", "iat"] {
        let token = ISSUER.mint(&reader(), issuer::AUDIENCE, 7200, json!({ claim: in_an_hour })).expect("a token");
        refuse_token(&start(), token).await.is(400, "InvalidIdentityToken", "future");
    }
}

#[tokio::test]
async fn a_token_for_somebody_else_is_refused() {
    let refused = refuse_token(&start(), ISSUER.for_another_audience(&reader()).expect("a token")).await;
    refused.is(400, "InvalidIdentityToken", "Incorrect token audience");
}

/// The provider may take an audience that the role does not.
#[tokio::test]
async fn the_trust_policy_has_its_own_say_on_the_audience() {
    let sts = start();
    let mut provider = provider();
    provider.client_ids.push("vault".to_owned());
    sts.set_provider(provider);
    let refused = refuse_token(&sts, ISSUER.for_another_audience(&reader()).expect("a token")).await;
    refused.is(403, "AccessDenied", "Not authorized to perform sts:AssumeRoleWithWebIdentity");
}

#[tokio::test]
async fn another_subject_is_denied() {
    let token = ISSUER.pod_token("default", "writer", "writer-0", "uid-1").expect("a token");
    refuse_token(&start(), token).await.is(403, "AccessDenied", "Not authorized");
}

#[tokio::test]
async fn a_role_that_does_not_exist_is_denied_in_the_same_words() {
    let sts = start();
    let refused = refuse(&sts, |ask| ask.role_arn("arn:aws:iam::111122223333:role/nobody")).await;
    let token = ISSUER.pod_token("default", "writer", "writer-0", "uid-1").expect("a token");
    assert_eq!(refused, refuse_token(&sts, token).await);
    sts.remove_role(READER);
    refuse(&sts, |ask| ask).await.is(403, "AccessDenied", "Not authorized");
}

/// A trust policy as people write them: several subjects, a pattern, and an exception.
#[tokio::test]
async fn trust_policies_are_read_as_iam_reads_them() {
    let role: Role = serde_json::from_value(json!({
        "Arn": "arn:aws-cn:iam::111122223333:role/team/reader",
        "AssumeRolePolicyDocument": {
            "Version": "2012-10-17",
            "Statement": [
                {
                    "Effect": "Allow",
                    "Principal": { "Federated": "arn:aws-cn:iam::111122223333:oidc-provider/issuer.example/cluster" },
                    "Action": "sts:AssumeRoleWithWebIdentity",
                    "Condition": { "StringLike": { "issuer.example/cluster:sub": [
                        "system:serviceaccount:team-?:*",
                        "system:serviceaccount:default:reader",
                    ] } },
                },
                {
                    "Effect": "Deny",
                    "Principal": { "Federated": "*" },
                    "Action": ["sts:*"],
                    "Condition": { "StringEquals": { "issuer.example/cluster:sub": "system:serviceaccount:team-a:root" } },
                },
            ],
        },
    }))
    .expect("a role");
    let (sts, arn) = (start(), role.arn.clone());
    sts.set_role(role);
    for (namespace, account, trusted) in [
        ("team-a", "app", true),
        ("default", "reader", true),
        ("team-a", "root", false),
        ("team-ab", "app", false),
        ("default", "writer", false),
    ] {
        let token = ISSUER.pod_token(namespace, account, "pod", "uid").expect("a token");
        let answer = assume(&sts, |ask| ask.role_arn(&arn).web_identity_token(token)).await;
        assert_eq!(answer.is_ok(), trusted, "{namespace}/{account}: {answer:?}");
        if let Ok(output) = answer {
            let expected = "arn:aws-cn:sts::111122223333:assumed-role/reader/default.reader";
            assert_eq!(output.assumed_role_user().expect("a user").arn(), expected);
        }
    }
}

/// A key set that is published over TLS, as an API server does it, and one that cannot be reached.
#[tokio::test]
async fn published_keys_are_fetched_and_rotated() {
    let first = Issuer::with_elliptic_curve("https://rotating.example").expect("an issuer");
    let second = Issuer::with_elliptic_curve(first.url()).expect("an issuer");
    let published = std::sync::Arc::new(std::sync::Mutex::new(first.jwks().expect("a key set")));
    let tls = Tls::for_names(&["127.0.0.1"]).expect("a certificate");
    let served = published.clone();
    let server = crate::listener::Server::start("jwks", listener(), Some(tls.config()), move |_, request| {
        let body = serde_json::to_vec(&*served.lock().expect("a key set")).expect("JSON");
        assert_eq!(request.uri().path(), "/openid/v1/jwks");
        async { Ok(crate::listener::answer(http::StatusCode::OK, "application/jwk-set+json", body)) }
    })
    .expect("a server");
    let jwks = Jwks {
        url: format!("https://{}/openid/v1/jwks", server.address()),
        authority: tls.authority_pem().to_owned(),
        ..Jwks::default()
    };

    let sts = start();
    sts.set_provider(Provider::new(first.url(), Keys::Published(jwks.clone())));
    sts.set_role(Role::trusting(READER, first.url(), &reader()));
    let token = |issuer: &Issuer| issuer.mint(&reader(), issuer::AUDIENCE, 600, Value::Null).expect("a token");
    assume(&sts, |ask| ask.web_identity_token(token(&first))).await.expect("a session");
    *published.lock().expect("a key set") = second.jwks().expect("a key set");
    assume(&sts, |ask| ask.web_identity_token(token(&second))).await.expect("a session");

    drop(server);
    sts.set_provider(Provider::new(first.url(), Keys::Published(jwks)));
    refuse_token(&sts, token(&second)).await.is(400, "IDPCommunicationError", "could not be reached");
}
