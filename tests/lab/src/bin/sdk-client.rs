//! AWS's SDK for Rust as a pod would use it: prints, as JSON, who its default chain makes the caller.

use anyhow::Context as _;
use aws_config::BehaviorVersion;
use aws_sdk_sts::{config::ProvideCredentials as _, error::DisplayErrorContext};
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
    /// Installs the SDKs of the tests that are not part of this program.
    Prepare,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    match Args::parse().what {
        What::Identity { endpoint_url } => identity(&endpoint_url).await,
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
