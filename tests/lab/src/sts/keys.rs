//! The keys of an identity provider: given, or fetched from where the provider publishes them.

use std::{io, sync::Arc, time::Duration};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use jsonwebtoken::jwk::{Jwk, JwkSet};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tokio::{net::TcpStream, sync::Mutex, time::timeout};

use super::token;

/// How long a provider may take to publish its keys.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the keys of a provider come from.
#[derive(Debug, Clone)]
pub enum Keys {
    Given(JwkSet),
    Published(Jwks),
}

/// A key set behind a URL, such as `https://<API server>/openid/v1/jwks`.
#[derive(Debug, Clone, Default)]
pub struct Jwks {
    pub url: String,
    /// PEM of the authority that the server's certificate is checked against.
    pub authority: String,
    /// PEM of a client certificate and its key.
    pub identity: Option<String>,
    pub bearer_token: Option<String>,
}

/// Keys with what was fetched last: a token with an unknown key makes for one fetch more, so that a
/// provider may rotate them.
#[derive(Debug)]
pub(super) struct KeyRing {
    source: Keys,
    fetched: Mutex<JwkSet>,
}

impl KeyRing {
    pub(super) fn new(source: Keys) -> Self {
        Self { source, fetched: Mutex::new(JwkSet { keys: Vec::new() }) }
    }

    /// The key of a token. An error means that the provider could not be asked.
    pub(super) async fn key_of(&self, token: &str) -> anyhow::Result<Option<Jwk>> {
        match &self.source {
            Keys::Given(keys) => Ok(token::key_of(token, keys)?.cloned()),
            Keys::Published(jwks) => {
                let mut fetched = self.fetched.lock().await;
                if let Some(key) = token::key_of(token, &fetched)? {
                    return Ok(Some(key.clone()));
                }
                *fetched = timeout(PATIENCE, jwks.fetch()).await?.with_context(|| format!("fetching {}", jwks.url))?;
                Ok(token::key_of(token, &fetched)?.cloned())
            }
        }
    }
}

impl Jwks {
    async fn fetch(&self) -> anyhow::Result<JwkSet> {
        let uri: Uri = self.url.parse()?;
        let host = uri.host().context("a URL without a host")?.trim_matches(['[', ']']);
        let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
        let stream = TcpStream::connect((host, port)).await?;
        let body = match uri.scheme_str() {
            Some("https") => {
                let tls = tokio_rustls::TlsConnector::from(Arc::new(self.client_config()?));
                let stream = tls.connect(ServerName::try_from(host.to_owned())?, stream).await?;
                self.get(&uri, TokioIo::new(stream)).await?
            }
            Some("http") => self.get(&uri, TokioIo::new(stream)).await?,
            _ => bail!("neither http nor https"),
        };
        Ok(serde_json::from_slice(&body)?)
    }

    async fn get<S>(&self, uri: &Uri, stream: S) -> anyhow::Result<Bytes>
    where
        S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await?;
        let connection = tokio::spawn(connection);
        let path = uri.path_and_query().map_or("/", |p| p.as_str());
        let mut request = Request::get(path).header(header::HOST, uri.authority().map_or("", |a| a.as_str()));
        if let Some(token) = &self.bearer_token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let response = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
        ensure!(response.status() == StatusCode::OK, "answered {}", response.status());
        let body = response.into_body().collect().await?.to_bytes();
        connection.abort();
        Ok(body)
    }

    fn client_config(&self) -> anyhow::Result<ClientConfig> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(self.authority.as_bytes()) {
            roots.add(certificate.map_err(io::Error::other)?)?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let Some(identity) = &self.identity else { return Ok(config.with_no_client_auth()) };
        let chain = CertificateDer::pem_slice_iter(identity.as_bytes()).collect::<Result<_, _>>()?;
        Ok(config.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(identity.as_bytes())?)?)
    }
}
