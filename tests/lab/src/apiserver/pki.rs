//! The keys and certificates of a cluster that lives as long as one program.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PKCS_RSA_SHA256, RsaKeySize, SanType,
};

type Ca = CertifiedIssuer<'static, KeyPair>;

/// Write `ca.crt`, `server.{crt,key}`, `admin.{crt,key}` and `sa.{key,pub}` into `folder`.
pub(super) fn create(folder: &Path, address: IpAddr) -> Result<()> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "lab");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    fs::write(folder.join("ca.crt"), ca.pem())?;

    let mut server = CertificateParams::new(["kubernetes.default.svc".into(), "localhost".into()])?;
    server.subject_alt_names.push(SanType::IpAddress(address));
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    issue(folder, "server", server, &ca)?;

    let mut admin = CertificateParams::default();
    admin.distinguished_name.push(DnType::CommonName, "admin");
    admin.distinguished_name.push(DnType::OrganizationName, "system:masters");
    admin.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    issue(folder, "admin", admin, &ca)?;

    // RSA, as EKS signs its tokens.
    let signing = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048)?;
    fs::write(folder.join("sa.key"), signing.serialize_pem())?;
    fs::write(folder.join("sa.pub"), signing.public_key_pem())?;
    Ok(())
}

fn issue(folder: &Path, name: &str, params: CertificateParams, ca: &Ca) -> Result<()> {
    let key = KeyPair::generate()?;
    fs::write(folder.join(format!("{name}.key")), key.serialize_pem())?;
    fs::write(folder.join(format!("{name}.crt")), params.signed_by(&key, ca)?.pem())?;
    Ok(())
}
