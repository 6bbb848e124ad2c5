//! A real MinIO as STS and as object store. It verifies tokens with the keys that the cluster's issuer publishes:
//! <https://github.com/minio/minio/blob/master/docs/sts/web-identity.md>

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use lab::agent::{Agent, Options, field};
use lab::clients::Installed;
use lab::http::Client;
use lab::namespace::BASE;
use lab::net::Pod;
use lab::poll::poll_every;
use lab::process::Process;

use crate::rights::AgentRights;
use crate::site::{AUDIENCE, ROLE_ARN, Site, blocking, list, retry_while_503};

/// MinIO names the role of an issuer by its audience: the SHA-1 of [`AUDIENCE`], base64url.
const ROLE: &str = "arn:minio:iam:::role/oxnUw3DAuQF1uggjXGxI2AmW8IA";
const BUCKET: &str = "readings";
const READ_ONLY: &str =
    r#"{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"s3:GetObject","Resource":"*"}]}"#;
/// Maximum start time: MinIO takes a few seconds on an idle machine.
const START_TIMEOUT: Duration = Duration::from_secs(60);

struct Minio {
    process: Process,
    url: String,
}

impl Minio {
    /// Starts MinIO with one role for all service accounts of the cluster, which can read and write everything.
    fn start(program: &Installed, site: &Site) -> Result<Self> {
        let folder = site.node.state().join("minio");
        let (certificates, data) = (folder.join("certs"), folder.join("data"));
        trust(&certificates, &site.api.ca())?;
        // MinIO treats a directory as a bucket.
        fs::create_dir_all(data.join(BUCKET))?;
        let address = TcpListener::bind((BASE, 0))?.local_addr()?;
        let mut command = program.command();
        command.args(["server", "--address", &address.to_string(), "--certs-dir"]).args([certificates, data]);
        command.envs([
            ("MINIO_ROOT_USER", "administrator"),
            ("MINIO_ROOT_PASSWORD", "the-administrators-password"),
            ("MINIO_BROWSER", "off"),
            ("MINIO_UPDATE", "off"),
            // Allows data on the root file system.
            ("MINIO_CI_CD", "on"),
            ("MINIO_IDENTITY_OPENID_CLIENT_ID", AUDIENCE),
            ("MINIO_IDENTITY_OPENID_ROLE_POLICY", "readwrite"),
        ]);
        let issuer = format!("{}/.well-known/openid-configuration", site.api.url());
        command.env("MINIO_IDENTITY_OPENID_CONFIG_URL", issuer);
        let minio = Self { process: Process::spawn(None, "minio", command)?, url: format!("http://{address}") };
        let mut health = Client::new(site.node.netns(), address);
        // `Some(false)` if MinIO has exited.
        let ready = || {
            let answers = health.get("/minio/health/ready").send().is_ok_and(|answer| answer.status == 200);
            (answers || minio.process.ended()).then_some(answers)
        };
        let started = poll_every(Duration::from_millis(100), "MinIO to be ready", START_TIMEOUT, ready);
        ensure!(started.is_ok_and(|ready| ready), "MinIO does not start: {:#?}", minio.process.lines());
        Ok(minio)
    }

    /// Writes an object from a pod and reads it back; returns its content or the error code.
    fn round_trip(&self, boto3: &Installed, pod: &Pod) -> Result<String> {
        let mut command = boto3.python("with_s3_store.py");
        command.env("S3_URL", &self.url).env("BUCKET", BUCKET).env("KEY", pod.name());
        let output = pod.run(&mut command)?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

/// Installs the authority in the directory where MinIO expects trusted CA certificates.
fn trust(folder: &Path, authority: &Path) -> Result<()> {
    let folder = folder.join("CAs");
    fs::create_dir_all(&folder)?;
    fs::copy(authority, folder.join("cluster.crt"))?;
    Ok(())
}

#[test]
fn minio_accepts_tokens_of_cluster_issuer() -> Result<()> {
    let (Some(program), Some(boto3)) = (Installed::find_or_skip("minio"), Installed::find_or_skip("boto3")) else {
        return Ok(());
    };
    let site = Site::new()?;
    let minio = Minio::start(&program, &site)?;
    site.annotate("writer", &[(ROLE_ARN, ROLE)])?;
    site.annotate("reader", &[(ROLE_ARN, ROLE), ("kirsa.dev/session-policy", READ_ONLY)])?;
    site.annotate("stray", &[(ROLE_ARN, "arn:minio:iam:::role/unknown")])?;
    let kubeconfig =
        blocking(site.api.agent_kubeconfig(AgentRights::Impersonation.namespace(), "kirsa", site.node.name()))?;
    let options = Options::new(env!("CARGO_BIN_EXE_kirsa"))
        .flag("--kubeconfig", &kubeconfig)
        .flag("--sts-endpoint-url", &minio.url);
    let agent = Agent::start(&site.node, &options)?;
    let [writer, reader, stray] = ["writer", "reader", "stray"].map(|name| site.run(name, name));
    let (writer, reader, stray) = (writer?, reader?, stray?);

    let written = minio.round_trip(&boto3, &writer)?;
    ensure!(written == "a reading", "{written}: {:#?}", minio.process.lines());
    let refused = minio.round_trip(&boto3, &reader)?;
    ensure!(refused == "AccessDenied", "{refused}");
    // MinIO has one error code for all refusals, so its message goes to the log.
    ensure!(retry_while_503(|| list(&stray))?.status == 403);
    agent.wait_for_log(|entry| {
        field(entry, "reason") == Some("bad_sts_request") && entry.to_string().contains("role/unknown")
    })?;
    agent.stop()
}
