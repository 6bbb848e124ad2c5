//! What stands in for AWS, met by unmodified SDKs and by hand, before kirsa stands in between.

use std::{fs, net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::{
    apiserver::{self, ApiServer},
    imds::{Canary, Credentials, Instance, NODE_ROLE},
    issuer::{self, Issuer},
    namespace::BASE,
    net::{Node, Shape},
    process::Process,
    sdk,
    sts::{Config, Jwks, Keys, Provider, Role, StandIn},
};
use serde_json::Value;

lab::enter!();

const ROLE: &str = "arn:aws:iam::111122223333:role/reader";

fn stand_in() -> Result<(StandIn, Issuer)> {
    let issuer = Issuer::with_elliptic_curve("https://issuer.example")?;
    let config = Config {
        providers: vec![Provider::new(issuer.url(), Keys::Given(issuer.jwks()?))],
        roles: vec![Role::trusting(ROLE, issuer.url(), &issuer::subject("default", "reader"))],
        ..Config::default()
    };
    let listener = std::net::TcpListener::bind((BASE, 0))?;
    Ok((StandIn::start(listener, config)?, issuer))
}

/// What the stand-in gives for a token.
async fn exchange(sts_url: &str, token: &str) -> Result<Credentials> {
    let config = aws_sdk_sts::Config::builder()
        .behavior_version(aws_sdk_sts::config::BehaviorVersion::latest())
        .region(aws_sdk_sts::config::Region::new(sdk::REGION))
        .endpoint_url(sts_url);
    let ask = aws_sdk_sts::Client::from_conf(config.build()).assume_role_with_web_identity();
    let ask = ask.role_arn(ROLE).role_session_name("default.reader");
    let output = ask.web_identity_token(token).send().await?;
    let issued = output.credentials().context("credentials")?;
    Ok(Credentials {
        access_key_id: issued.access_key_id().to_owned(),
        secret_access_key: issued.secret_access_key().to_owned(),
        session_token: issued.session_token().to_owned(),
    })
}

/// Each SDK by its own default chain, at the metadata address, and what it then says it is.
#[tokio::test]
async fn sdks_find_credentials_at_the_metadata_address() -> Result<()> {
    let (sts, issuer) = stand_in()?;
    let node = Node::new()?;
    // The canary hands them out as the node's own.
    let token = issuer.pod_token("default", "reader", "reader-0", "uid-0")?;
    let credentials = exchange(&sts.url(), &token).await?;
    let access_key_id = credentials.access_key_id.clone();
    let canary = Canary::start(node.listen_metadata()?, Instance { credentials, ..Instance::default() })?;
    let show = |command: &mut Command| -> Result<Value> {
        let output = node.netns().output(command)?;
        ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    };

    let arn = "arn:aws:sts::111122223333:assumed-role/reader/default.reader";
    let rust = show(&mut sdk::rust(&sts.url())?)?;
    ensure!(rust["arn"] == arn && rust["access_key_id"] == access_key_id.as_str(), "{rust}");
    let boto3 = show(&mut sdk::boto3(&sts.url())?)?;
    ensure!(boto3["arn"] == arn && boto3["method"] == "iam-role", "{boto3}");
    let before = canary.hits().len();
    let boto = show(&mut sdk::boto()?)?;
    ensure!(boto["access_key_id"] == access_key_id.as_str(), "{boto}");
    // boto 2 knows no session tokens.
    ensure!(canary.hits()[before..].iter().all(|hit| hit.method == "GET"), "{:?}", canary.hits());
    Ok(())
}

/// The node's own credentials are worth nothing at the stand-in, so that a leak cannot pass for a success.
#[test]
fn the_credentials_of_the_node_are_unknown_to_the_sts() -> Result<()> {
    let (sts, _) = stand_in()?;
    let node = Node::new()?;
    let _canary = Canary::start(node.listen_metadata()?, Instance::default())?;
    for mut command in [sdk::rust(&sts.url())?, sdk::boto3(&sts.url())?] {
        let output = node.netns().output(&mut command)?;
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && told.contains("InvalidClientTokenId"), "{told}");
    }
    Ok(())
}

#[test]
fn without_credentials_an_sdk_says_so() -> Result<()> {
    let node = Node::new()?;
    let _canary = Canary::start(node.listen_metadata()?, Instance { role: None, ..Instance::default() })?;
    for mut command in [sdk::rust("http://10.251.0.1:9")?, sdk::boto3("http://10.251.0.1:9")?, sdk::boto()?] {
        let output = node.netns().output(&mut command)?;
        ensure!(!output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stdout));
    }
    Ok(())
}

/// The canary sees a pod wherever it comes through to it, and answers as EC2 does.
#[test]
fn the_canary_notes_who_asked_for_what() -> Result<()> {
    let node = Node::new()?;
    let canary = Canary::start(node.listen_metadata()?, Instance::default())?;
    ensure!(canary.hits().is_empty());
    let pod = node.pod("p", Shape::Bridge)?;
    let mut imds = pod.imds();
    ensure!(imds.role_list()?.ok()? == NODE_ROLE);
    let credentials = imds.credentials(NODE_ROLE)?.json()?;
    ensure!(credentials["Code"] == "Success" && credentials["Expiration"].as_str().is_some_and(|at| at.len() == 20));
    let missing = imds.credentials("other")?;
    ensure!(missing.status == 404 && missing.body.contains("<h1>404 - Not Found</h1>"), "{missing:?}");
    let document = imds.get("/latest/dynamic/instance-identity/document").send()?.json()?;
    ensure!(document["region"] == sdk::REGION, "{document}");
    let stale = imds.get("/latest/meta-data/").header(lab::http::TOKEN, "AQAEstale").send()?;
    ensure!(stale.status == 401, "{stale:?}");
    let endless = imds.put("/latest/api/token").header(lab::http::TOKEN_TTL, "21601").send()?;
    ensure!(endless.status == 400, "{endless:?}");

    let hits = canary.hits();
    ensure!(hits.iter().all(|hit| hit.from.ip() == pod.ip()), "{hits:?}");
    let asked: Vec<String> = hits.iter().map(|hit| format!("{} {}", hit.method, hit.path)).collect();
    ensure!(asked[..2] == ["PUT /latest/api/token", "GET /latest/meta-data/iam/security-credentials/"], "{asked:?}");
    ensure!(asked.len() == 9, "{asked:?}");
    Ok(())
}

#[test]
fn a_canary_that_requires_tokens_says_401() -> Result<()> {
    let node = Node::new()?;
    let instance = Instance { requires_token: true, ..Instance::default() };
    let _canary = Canary::start(node.listen_metadata()?, instance)?;
    let pod = node.pod("p", Shape::Bridge)?;
    let mut imds = pod.imds();
    ensure!(imds.get("/latest/meta-data/").send()?.status == 401);
    ensure!(imds.role_list()?.status == 200);
    Ok(())
}

/// A token of a real API server is verified with the keys that it publishes, and its pod is remembered.
#[tokio::test]
async fn the_sts_believes_a_real_api_server() -> Result<()> {
    let server = ApiServer::get()?;
    server.node("n1").await?;
    server.service_account("aws", "reader", &[]).await?;
    server.service_account("aws", "writer", &[]).await?;
    let uid = server.pod("aws", "reader-0", "reader", "n1").await?;
    let writer_uid = server.pod("aws", "writer-0", "writer", "n1").await?;

    let (sts, _) = stand_in()?;
    let url = format!("{}/openid/v1/jwks", server.url());
    let jwks = Jwks { url, authority: fs::read_to_string(server.ca())?, ..Jwks::default() };
    sts.set_provider(Provider::new(apiserver::ISSUER, Keys::Published(jwks)));
    sts.set_role(Role::trusting(ROLE, apiserver::ISSUER, &issuer::subject("aws", "reader")));

    let token = server.token("aws", "reader", ("reader-0", &uid), Some(issuer::AUDIENCE)).await?;
    let credentials = exchange(&sts.url(), &token).await?;
    let session = sts.session(&credentials.access_key_id).context("a session")?;
    let kubernetes = session.claims.kubernetes.context("Kubernetes' claim")?;
    ensure!(kubernetes.pod.is_some_and(|pod| pod.name == "reader-0" && pod.uid == uid), "{:?}", sts.calls());
    ensure!(kubernetes.node.is_some_and(|node| node.name == "n1"), "{:?}", sts.calls());

    for (account, pod, audience) in [
        ("writer", ("writer-0", writer_uid.as_str()), Some(issuer::AUDIENCE)),
        ("reader", ("reader-0", uid.as_str()), Some("vault")),
        ("reader", ("reader-0", uid.as_str()), None),
    ] {
        let token = server.token("aws", account, pod, audience).await?;
        ensure!(exchange(&sts.url(), &token).await.is_err(), "{account} for {audience:?}");
    }
    Ok(())
}

/// The stand-in as a program: what IAM holds comes from a file, the switches from the control port.
#[tokio::test]
async fn the_sts_runs_as_a_process_of_its_own() -> Result<()> {
    let issuer = Issuer::with_elliptic_curve("https://issuer.example")?;
    let node = Node::new()?;
    let jwks = node.state().join("jwks.json");
    fs::write(&jwks, serde_json::to_vec(&issuer.jwks()?)?)?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_lab-sts"));
    command.arg("--account").arg(concat!(env!("CARGO_MANIFEST_DIR"), "/account.example.json"));
    command.arg("--jwks").arg(&jwks).args(["--control", &format!("{BASE}:0")]);
    let process = Process::spawn(None, "lab-sts", command)?;
    let ready: Value = serde_json::from_str(&process.wait_for_line(Duration::from_secs(5), |_| true)?)?;
    let url = ready["url"].as_str().context("a URL")?;
    let control: SocketAddr = ready["control"].as_str().context("an address")?.parse()?;

    let token = issuer.pod_token("default", "reader", "reader-0", "uid-0")?;
    let credentials = exchange(url, &token).await?;
    let mut control = lab::http::Client::new(node.netns(), control);
    let fault = r#"{"effect":{"error":{"code":"AccessDenied"}},"when":{"next":1}}"#;
    let length = fault.len();
    let post = format!("POST /_control/faults HTTP/1.1\r\nHost: lab\r\nContent-Length: {length}\r\n\r\n{fault}");
    ensure!(control.raw(post.as_bytes())?.status == 200);
    ensure!(exchange(url, &token).await.is_err());
    let calls = control.get("/_control/calls").send()?.json()?;
    ensure!(calls[0]["outcome"]["issued"]["access_key_id"] == credentials.access_key_id.as_str(), "{calls}");
    ensure!(calls[1]["outcome"]["refused"]["code"] == "AccessDenied", "{calls}");
    Ok(())
}
