//! S3-compatible stores, whose STS answers less than AWS's.

use anyhow::{Result, ensure};
use lab::net::Pod;
use lab::site::Site;
use lab::sts::{Dialect, Effect, Fault};
use lab::workloads::Workload;

use super::{detail, list, refusal, site};

/// A pod whose role is named as the store does it.
fn pod(site: &Site, name: &str, arn: &str) -> Result<Pod> {
    let pod = site.stranger(name)?;
    site.trust(arn, name);
    let token = site.write_token(name, site.issuer.pod_token("default", name, name, name)?)?;
    site.put(Workload::new(&pod, name).role(arn, &token))?;
    Ok(pod)
}

#[test]
fn minio_and_ceph_are_served_with_their_own_role_arns() -> Result<()> {
    for (dialect, arn, role) in [
        (Dialect::Minio, "arn:minio:iam:::role/idmpolicy-3fe2c1", "idmpolicy-3fe2c1"),
        (Dialect::Ceph, "arn:aws:iam:::role/path/reader", "reader"),
    ] {
        let site = site()?;
        site.sts.configure(|settings| settings.dialect = dialect);
        let reader = pod(&site, "reader", arn)?;
        let agent = site.start()?;
        ensure!(list(&reader)?.ok()? == role, "{dialect:?}");
        let document = reader.imds().credentials(role)?;
        let session = site.session(&document.body)?;
        ensure!(session.role_arn == arn && session.account.is_empty(), "{dialect:?}: {session:?}");
        // Whole seconds, whatever the store says.
        let expiration = document.json()?["Expiration"].as_str().map(str::to_owned);
        ensure!(expiration == Some(session.expiration.to_string()), "{dialect:?}: {document:?}");
        // There is no account to tell.
        let extended = format!("/latest/meta-data/iam/security-credentials-extended/{role}");
        ensure!(reader.imds().get(&extended).send()?.body == document.body, "{dialect:?}");
        site.no_pod_got_outside()?;
        agent.stop()?;
    }
    Ok(())
}

/// MinIO refuses everything by one code: only its text tells why, so that goes to the log.
#[test]
fn a_refusal_of_minio_is_logged_in_its_own_words() -> Result<()> {
    let site = site()?;
    site.sts.configure(|settings| settings.dialect = Dialect::Minio);
    let arn = "arn:minio:iam:::role/denied";
    let denied = pod(&site, "denied", arn)?;
    let error = Effect::Error { code: "AccessDenied".into(), message: Some("None of the given policies exist".into()) };
    site.sts.inject(Fault::always(error));
    let agent = site.start()?;
    ensure!(list(&denied)?.status == 403);
    let entry = refusal(&agent, &denied, "bad_sts_request")?;
    ensure!(detail(&entry).contains("None of the given policies exist"), "{entry}");
    ensure!(detail(&entry).contains("InvalidParameterValue") && detail(&entry).contains(arn), "{entry}");
    agent.stop()
}
