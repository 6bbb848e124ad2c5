//! The stand-in, asked by AWS's own SDK: what it grants, and that it can say no in every way that it
//! claims to.

mod caller_identity;
mod control;
mod faults;
mod object;
mod tokens;
mod validation;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::LazyLock,
    time::Duration,
};

use aws_sdk_sts::{
    Client,
    config::{BehaviorVersion, Credentials, Region, retry::RetryConfig},
    error::{ProvideErrorMetadata, SdkError},
    operation::assume_role_with_web_identity::{
        AssumeRoleWithWebIdentityOutput, builders::AssumeRoleWithWebIdentityFluentBuilder,
    },
    types::PolicyDescriptorType,
};

use super::*;
use crate::issuer::{self, Issuer};

const READER: &str = "arn:aws:iam::111122223333:role/reader";
const DEADLINE: Duration = Duration::from_secs(5);

static ISSUER: LazyLock<Issuer> =
    LazyLock::new(|| Issuer::with_elliptic_curve("https://issuer.example/cluster").expect("an issuer"));

fn reader() -> String {
    issuer::subject("default", "reader")
}

fn provider() -> Provider {
    Provider::new(ISSUER.url(), Keys::Given(ISSUER.jwks().expect("a key set")))
}

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").expect("a free port")
}

/// A stand-in with one role, that of `default/reader`.
fn start() -> StandIn {
    start_with(Config::default())
}

fn start_with(mut config: Config) -> StandIn {
    config.providers.push(provider());
    config.roles.push(Role::trusting(READER, ISSUER.url(), &reader()));
    StandIn::start(listener(), config).expect("a stand-in")
}

fn client(sts: &StandIn) -> Client {
    client_with(sts, |config| config)
}

fn client_with(
    sts: &StandIn,
    adjust: impl FnOnce(aws_sdk_sts::config::Builder) -> aws_sdk_sts::config::Builder,
) -> Client {
    let config = aws_sdk_sts::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("eu-central-1"))
        .endpoint_url(sts.url())
        .retry_config(RetryConfig::disabled());
    Client::from_conf(adjust(config).build())
}

/// What a caller is told.
#[derive(Debug, PartialEq, Eq)]
struct Refused {
    status: u16,
    code: String,
    message: String,
}

impl Refused {
    fn of<E: ProvideErrorMetadata + std::fmt::Debug>(error: SdkError<E>) -> Self {
        let SdkError::ServiceError(answer) = error else { panic!("no refusal: {error:?}") };
        let (code, message) = (answer.err().code(), answer.err().message());
        Self {
            status: answer.raw().status().as_u16(),
            code: code.unwrap_or_default().to_owned(),
            message: message.unwrap_or_default().to_owned(),
        }
    }

    #[track_caller]
    fn is(&self, status: u16, code: &str, message: &str) {
        assert_eq!((self.status, self.code.as_str()), (status, code), "{self:?}");
        assert!(self.message.contains(message), "{:?} has no {message:?}", self.message);
    }
}

/// A good request, after `change`.
async fn assume(
    sts: &StandIn,
    change: impl FnOnce(AssumeRoleWithWebIdentityFluentBuilder) -> AssumeRoleWithWebIdentityFluentBuilder,
) -> Result<AssumeRoleWithWebIdentityOutput, Refused> {
    let token = ISSUER.pod_token("default", "reader", "reader-0", "uid-0").expect("a token");
    let good = client(sts)
        .assume_role_with_web_identity()
        .role_arn(READER)
        .role_session_name("default.reader")
        .web_identity_token(token);
    change(good).send().await.map_err(Refused::of)
}

async fn refuse(
    sts: &StandIn,
    change: impl FnOnce(AssumeRoleWithWebIdentityFluentBuilder) -> AssumeRoleWithWebIdentityFluentBuilder,
) -> Refused {
    assume(sts, change).await.expect_err("a refusal")
}

/// Asks who `credentials` are.
async fn identity(sts: &StandIn, credentials: Credentials) -> Result<String, Refused> {
    let client = client_with(sts, |config| config.credentials_provider(credentials));
    let answer = client.get_caller_identity().send().await.map_err(Refused::of)?;
    Ok(answer.arn.unwrap_or_default())
}

fn credentials(output: &AssumeRoleWithWebIdentityOutput) -> Credentials {
    let issued = output.credentials().expect("credentials");
    let token = issued.session_token().to_owned();
    Credentials::new(issued.access_key_id(), issued.secret_access_key(), Some(token), None, "test")
}

fn policy_arn(arn: &str) -> PolicyDescriptorType {
    PolicyDescriptorType::builder().arn(arn).build()
}

fn request(method: &str, path: &str, body: &str) -> String {
    let length = body.len();
    format!("{method} {path} HTTP/1.1\r\nhost: sts\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}")
}

/// One request by hand; returns the head and the body of the answer.
fn exchange(address: SocketAddr, method: &str, path: &str, body: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.write_all(request(method, path, body).as_bytes()).expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    (head.to_owned(), body.to_owned())
}
