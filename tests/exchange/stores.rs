//! S3-compatible stores, whose STS returns less than AWS.

use anyhow::{Result, ensure};
use lab::net::Pod;
use lab::site::Site;
use lab::sts::{Dialect, Effect, Fault};
use lab::workloads::Workload;

use super::{detail, list, refusal, site};

/// Adds a pod with a role ARN in the store's format.
fn pod(site: &Site, name: &str, arn: &str) -> Result<Pod> {
    let pod = site.stranger(name)?;
    site.trust(arn, name);
    let token = site.write_token(name, site.issuer.pod_token("default", name, name, name)?)?;
    site.put(Workload::new(&pod, name).role(arn, &token))?;
    Ok(pod)
}

#[test]
fn minio_and_ceph_role_arns_are_served() -> Result<()> {
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
        // Whole seconds, even if the store returns fractions.
        let expiration = document.json()?["Expiration"].as_str().map(str::to_owned);
        ensure!(expiration == Some(session.expiration.to_string()), "{dialect:?}: {document:?}");
        // A store has no account ID.
        let extended = format!("/latest/meta-data/iam/security-credentials-extended/{role}");
        ensure!(reader.imds().get(&extended).send()?.body == document.body, "{dialect:?}");
        site.no_pod_got_outside()?;
        agent.stop()?;
    }
    Ok(())
}

/// MinIO uses one error code for everything, so the log has its message.
#[test]
fn minio_error_message_is_logged() -> Result<()> {
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
