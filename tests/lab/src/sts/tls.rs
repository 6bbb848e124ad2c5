//! A certificate for the STS listener and the authority that signed it, made for one run.

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::{ServerConfig, pki_types::PrivateKeyDer};

/// What the listener presents. Names that no client asks for make a certificate that none accepts.
#[derive(Debug, Clone)]
pub struct Tls {
    authority_pem: String,
    config: Arc<ServerConfig>,
}

impl Tls {
    /// `names` are host names and IP addresses.
    pub fn for_names(names: &[&str]) -> anyhow::Result<Self> {
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "lab authority");
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(names)?.signed_by(&key, &authority)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?,
            )?;
        Ok(Self { authority_pem: authority.pem(), config: Arc::new(config) })
    }

    /// Offers HTTP/2 before HTTP/1.1, as proxies do that stand before a store.
    #[must_use]
    pub fn http2(self) -> Self {
        let mut config = ServerConfig::clone(&self.config);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Self { config: Arc::new(config), ..self }
    }

    /// For the client's list of authorities, as in `SSL_CERT_FILE`.
    pub fn authority_pem(&self) -> &str {
        &self.authority_pem
    }

    pub(super) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }
}
