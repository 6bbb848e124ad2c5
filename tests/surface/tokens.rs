//! Stolen and forged IMDS tokens.

use anyhow::{Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use lab::http::{CREDENTIALS_PATH, TOKEN};
use lab::net::Shape;
use lab::poll::poll;

use super::{TIMEOUT, credentials, get, get_with, has_credentials_of, no_upstream_calls_except_sts, site};

/// 2100-01-01T00:00:00Z
const YEAR_2100: u64 = 4_102_444_800;

/// IMDS-6
#[test]
fn forged_tokens_are_rejected() -> Result<()> {
    let site = site()?;
    let (reader, writer) = (site.pod_with_role("reader")?, site.pod_with_role("writer")?);
    let agent = site.start()?;
    let mut imds = reader.imds();
    let good = imds.put_token(21_600)?;
    let raw = URL_SAFE_NO_PAD.decode(&good)?;
    let mut forged = Vec::new();
    for bit in 0..raw.len() * 8 {
        let mut changed = raw.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        forged.push(URL_SAFE_NO_PAD.encode(changed));
    }
    // One byte for the binding, then the issue and expiry times as Unix time in 40 bits. Change only the expiry.
    let seconds = |at: usize| raw[at..at + 5].iter().fold(0, |seconds, byte| seconds << 8 | u64::from(*byte));
    ensure!(seconds(6) == seconds(1) + 21_600, "the format has changed: {raw:?}");
    let mut later = raw.clone();
    later[6..11].copy_from_slice(&YEAR_2100.to_be_bytes()[3..]);
    forged.push(URL_SAFE_NO_PAD.encode(later));
    let foreign = URL_SAFE_NO_PAD.decode(writer.imds().put_token(21_600)?)?;
    let half = raw.len() / 2;
    forged.extend([
        URL_SAFE_NO_PAD.encode([&raw[..half], &foreign[half..]].concat()),
        URL_SAFE_NO_PAD.encode([&foreign[..half], &raw[half..]].concat()),
        URL_SAFE_NO_PAD.encode(&raw[..half]),
        URL_SAFE_NO_PAD.encode([&raw[..], &raw[..]].concat()),
        URL_SAFE_NO_PAD.encode(vec![0; raw.len()]),
        format!("{good}="),
        format!("{good}A"),
        format!("{good},{good}"),
        good.to_lowercase(),
    ]);
    for token in &forged {
        let response = get_with(&mut imds, &credentials("reader"), &[(TOKEN, token)])?;
        ensure!(response.status == 401, "{token}: {response:?}");
    }
    has_credentials_of(&site, "reader", &get_with(&mut imds, &credentials("reader"), &[(TOKEN, &good)])?)?;
    no_upstream_calls_except_sts(&site, &["reader", "writer"])?;
    agent.stop()
}

/// IMDS-6: an address may be reused by another pod within seconds.
#[test]
fn token_of_former_pod_at_address_is_rejected() -> Result<()> {
    let site = site()?;
    let address = site.node.allocate();
    let first = site.node.pod_at("first", Shape::RoutedBare, address)?;
    site.put(site.with_role(&first)?)?;
    let agent = site.start()?;
    let token = first.imds().put_token(21_600)?;
    ensure!(get_with(&mut first.imds(), CREDENTIALS_PATH, &[(TOKEN, &token)])?.body == "first-role");

    site.remove("first")?;
    first.delete();
    let second = site.node.pod_at("second", Shape::RoutedBare, address)?;
    site.put(site.with_role(&second)?)?;
    poll("the second pod to be known", TIMEOUT, || {
        get(&second, CREDENTIALS_PATH).is_ok_and(|response| response.body == "second-role").then_some(())
    })?;
    let response = get_with(&mut second.imds(), &credentials("second"), &[(TOKEN, &token)])?;
    ensure!(response.status == 401, "{response:?}");
    ensure!(get(&second, &credentials("first"))?.status == 404);
    has_credentials_of(&site, "second", &get(&second, &credentials("second"))?)?;
    no_upstream_calls_except_sts(&site, &["first", "second"])?;
    agent.stop()
}

/// A token that was issued before its pod was known stays valid: SDKs may cache it for six hours.
#[test]
fn token_from_before_pod_was_known_stays_valid() -> Result<()> {
    let site = site()?;
    let (late, other) = (site.stranger("late")?, site.pod("other")?);
    let entry = site.with_role(&late)?;
    let agent = site.start()?;
    let token = late.imds().put_token(21_600)?;
    site.put(entry)?;
    poll("the pod to be known", TIMEOUT, || {
        get_with(&mut late.imds(), CREDENTIALS_PATH, &[(TOKEN, &token)]).is_ok_and(|a| a.status == 200).then_some(())
    })?;
    has_credentials_of(&site, "late", &get_with(&mut late.imds(), &credentials("late"), &[(TOKEN, &token)])?)?;
    ensure!(
        get_with(&mut other.imds(), CREDENTIALS_PATH, &[(TOKEN, &token)])?.status == 401,
        "it is bound to its address"
    );
    no_upstream_calls_except_sts(&site, &["late"])?;
    agent.stop()
}
