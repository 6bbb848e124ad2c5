//! rusoto, which programs in Rust used before there was an SDK of AWS's, and some still do.

use std::{env, error::Error, io, time::Instant};

use hyper::client::HttpConnector;
use rusoto_core::{HttpClient, Region, credential::DefaultCredentialsProvider};
use rusoto_sts::{GetCallerIdentityRequest, Sts, StsClient};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    tell().await;
    for _ in io::stdin().lines() {
        tell().await;
    }
}

async fn tell() {
    let start = Instant::now();
    let error = call().await.err().map(|error| error.to_string());
    println!("{}", serde_json::json!({ "seconds": start.elapsed().as_secs_f64(), "error": error }));
}

/// With a provider of its own: there is no way to have one fetch before it is time.
async fn call() -> Result<(), Box<dyn Error>> {
    let region = Region::Custom { name: env::var("AWS_REGION")?, endpoint: env::var("STS_URL")? };
    // Its own connector knows https only.
    let http = HttpClient::from_connector(HttpConnector::new());
    let sts = StsClient::new_with(http, DefaultCredentialsProvider::new()?, region);
    sts.get_caller_identity(GetCallerIdentityRequest {}).await?;
    Ok(())
}
