//! AWS's SDK for Rust as a pod would use it: prints, as JSON, who its default chain makes the caller.

use std::time::Instant;

use anyhow::Context as _;
use aws_config::{BehaviorVersion, imds::credentials::ImdsCredentialsProvider};
use aws_sdk_sts::{
    config::{ProvideCredentials as _, SharedCredentialsProvider},
    error::DisplayErrorContext,
};
use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Asks an STS who the caller is.
    Identity {
        /// The STS to ask.
        #[arg(long)]
        endpoint_url: String,
    },
    /// The same for the clients of the matrix: at `STS_URL`, each call a line of JSON, the next one for a line that
    /// comes in.
    Calls {
        /// By the provider for the metadata service alone, and not the chain that it is part of.
        #[arg(long)]
        imds: bool,
    },
    /// Installs the SDKs of the tests that are not part of this program.
    Prepare,
}

/// With one provider, which keeps its session token, and asks for credentials again for each call.
async fn calls(imds: bool) -> anyhow::Result<()> {
    let url = std::env::var("STS_URL")?;
    let start = Instant::now();
    let mut config = aws_config::load_defaults(BehaviorVersion::latest()).await;
    if imds {
        let provider = SharedCredentialsProvider::new(ImdsCredentialsProvider::builder().build());
        config = config.into_builder().credentials_provider(provider).build();
    }
    tell(start, call(&config, &url).await);
    for _ in std::io::stdin().lines() {
        let start = Instant::now();
        tell(start, call(&config, &url).await);
    }
    Ok(())
}

async fn call(config: &aws_config::SdkConfig, url: &str) -> anyhow::Result<()> {
    let provider = config.credentials_provider().context("a chain of providers")?;
    let credentials = provider.provide_credentials().await;
    let credentials = credentials.map_err(|error| anyhow::anyhow!("{}", DisplayErrorContext(error)))?;
    let sts = aws_sdk_sts::config::Builder::from(config).endpoint_url(url).credentials_provider(credentials).build();
    let answer = aws_sdk_sts::Client::from_conf(sts).get_caller_identity().send().await;
    answer.map(|_| ()).map_err(|error| anyhow::anyhow!("{}", DisplayErrorContext(error)))
}

fn tell(start: Instant, result: anyhow::Result<()>) {
    let error = result.err().map(|error| format!("{error:#}"));
    println!("{}", serde_json::json!({ "seconds": start.elapsed().as_secs_f64(), "error": error }));
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    match Args::parse().what {
        What::Identity { endpoint_url } => identity(&endpoint_url).await,
        What::Calls { imds } => calls(imds).await,
        What::Prepare => lab::sdk::prepare(),
    }
}

async fn identity(endpoint_url: &str) -> anyhow::Result<()> {
    let config = aws_config::load_defaults(BehaviorVersion::latest()).await;
    let provider = config.credentials_provider().context("a chain of providers")?;
    let credentials = provider.provide_credentials().await?;
    let sts = aws_sdk_sts::config::Builder::from(&config).endpoint_url(endpoint_url).build();
    let answer = aws_sdk_sts::Client::from_conf(sts).get_caller_identity().send().await;
    let identity = answer.map_err(|error| anyhow::anyhow!("{}", DisplayErrorContext(error)))?;
    let shown = serde_json::json!({
        "arn": identity.arn(),
        "account": identity.account(),
        "access_key_id": credentials.access_key_id(),
    });
    println!("{shown}");
    Ok(())
}
