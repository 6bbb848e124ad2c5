//! The STS stand-in as a process of its own. Says on standard output, in one line of JSON, where it listens.

use std::{fs, io::Write as _, net::TcpListener, path::PathBuf};

use anyhow::Context as _;
use clap::Parser;
use lab::sts::{Config, Jwks, Keys, Provider, Role, Settings, StandIn, Tls};
use serde::Deserialize;

#[derive(Parser)]
struct Args {
    /// Where clients find the STS.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: String,
    /// Where the switches are: `/_control/…`.
    #[arg(long, default_value = "127.0.0.1:0")]
    control: String,
    /// JSON: providers as `aws iam get-open-id-connect-provider` prints them, roles as `aws iam get-role`.
    #[arg(long)]
    account: PathBuf,
    /// A file with the key set of the providers, or the URL where they publish it.
    #[arg(long)]
    jwks: String,
    /// PEM file of the authority for that URL.
    #[arg(long)]
    jwks_authority: Option<PathBuf>,
    /// PEM file with a client certificate and its key for that URL.
    #[arg(long)]
    jwks_identity: Option<PathBuf>,
    /// File with a bearer token for that URL.
    #[arg(long)]
    jwks_token: Option<PathBuf>,
    /// Speaks HTTPS under this name; may be given several times.
    #[arg(long, requires = "tls_authority")]
    tls_name: Vec<String>,
    /// Where to leave the authority that clients have to trust then.
    #[arg(long)]
    tls_authority: Option<PathBuf>,
}

/// What IAM holds.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Account {
    providers: Vec<Registration>,
    roles: Vec<Role>,
    #[serde(default)]
    settings: Settings,
}

#[derive(Deserialize)]
struct Registration {
    #[serde(rename = "Url")]
    url: String,
    #[serde(rename = "ClientIDList")]
    client_ids: Vec<String>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let account: Account = serde_json::from_str(&read(&args.account)?).context("--account")?;
    let keys = keys(&args)?;
    let provider = |one: Registration| Provider { issuer: one.url, client_ids: one.client_ids, keys: keys.clone() };
    let config = Config {
        providers: account.providers.into_iter().map(provider).collect(),
        roles: account.roles,
        settings: account.settings,
        tls: tls(&args)?,
        control: Some(TcpListener::bind(&args.control).context("--control")?),
    };
    let sts = StandIn::start(TcpListener::bind(&args.listen).context("--listen")?, config)?;
    let ready = serde_json::json!({ "url": sts.url(), "control": sts.control_address() });
    writeln!(std::io::stdout(), "{ready}")?;
    loop {
        std::thread::park();
    }
}

fn keys(args: &Args) -> anyhow::Result<Keys> {
    if !args.jwks.starts_with("http") {
        return Ok(Keys::Given(serde_json::from_str(&read(&PathBuf::from(&args.jwks))?).context("--jwks")?));
    }
    Ok(Keys::Published(Jwks {
        url: args.jwks.clone(),
        authority: args.jwks_authority.as_ref().map(read).transpose()?.unwrap_or_default(),
        identity: args.jwks_identity.as_ref().map(read).transpose()?,
        bearer_token: args.jwks_token.as_ref().map(read).transpose()?.map(|token| token.trim().to_owned()),
    }))
}

fn tls(args: &Args) -> anyhow::Result<Option<Tls>> {
    let Some(authority) = args.tls_authority.as_ref().filter(|_| !args.tls_name.is_empty()) else { return Ok(None) };
    let names: Vec<&str> = args.tls_name.iter().map(String::as_str).collect();
    let tls = Tls::for_names(&names)?;
    fs::write(authority, tls.authority_pem()).with_context(|| authority.display().to_string())?;
    Ok(Some(tls))
}

fn read(path: &PathBuf) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}
