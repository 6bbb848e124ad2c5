//! Annotations of service accounts: those of IRSA
//! (<https://github.com/aws/amazon-eks-pod-identity-webhook/blob/master/README.md>) and kirsa's own. A malformed annotation
//! is refused, never guessed.

use std::{ops::RangeInclusive, time::Duration};

use super::{Account, RoleArn, SessionScope};

const KIRSA_PREFIX: &str = "kirsa.dev";

/// Values that apply without an annotation.
#[derive(Debug, Clone)]
pub struct Defaults {
    /// Prefix of IRSA's annotations.
    pub prefix: String,
    pub audience: String,
    pub duration: Duration,
    /// Durations that an annotation may choose from.
    pub durations: RangeInclusive<Duration>,
    pub scope: SessionScope,
    /// Whether role ARNs of S3-compatible stores are allowed.
    pub store_arns: bool,
}

/// Parsed annotations of a service account with a role.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SessionAnnotations {
    pub role: RoleArn,
    pub audience: String,
    pub duration: Duration,
    pub scope: SessionScope,
    pub policy: Option<String>,
    pub policy_arns: Vec<String>,
    pub require_imdsv2: bool,
}

/// Maximum length of a value in bytes. STS allows 2,048 characters for a session policy.
const MAX_LEN: usize = 2_048;
/// Maximum length of `session-policy-arns`, which has up to ten ARNs.
const MAX_ARNS_LEN: usize = 8_192;

/// Returns the maximum length of an annotation's value; `None` for an annotation that kirsa does not read.
pub(super) fn max_len(annotation: &str, role_annotation: &str) -> Option<usize> {
    let (prefix, name) = annotation.rsplit_once('/')?;
    let irsa = role_annotation.rsplit_once('/').is_some_and(|(irsa, _)| prefix == irsa)
        && ["role-arn", "audience", "token-expiration", "sts-regional-endpoints"].contains(&name);
    let own = prefix == KIRSA_PREFIX
        && ["session-duration", "session-scope", "session-policy", "session-policy-arns", "require-imdsv2"]
            .contains(&name);
    (irsa || own).then_some(if name == "session-policy-arns" { MAX_ARNS_LEN } else { MAX_LEN })
}

impl SessionAnnotations {
    /// Parses and validates the annotations. Returns `None` if the account has no role.
    ///
    /// # Errors
    /// A message with the malformed annotation, its value and the expected form.
    pub(super) fn parse(account: &Account, defaults: &Defaults) -> Result<Option<Self>, String> {
        let irsa = |name: &str| account.annotation(&format!("{}/{name}", defaults.prefix));
        let own = |name: &str| account.annotation(&format!("{KIRSA_PREFIX}/{name}"));
        let context = |prefix: &str, name: &str, error: String| format!("annotation {prefix}/{name}: {error}");
        let irsa_error = |name: &'static str| move |error| context(&defaults.prefix, name, error);
        let own_error = |name: &'static str| move |error| context(KIRSA_PREFIX, name, error);

        let Some(role) = irsa("role-arn") else { return Ok(None) };
        if let Some((name, length)) = &account.oversized {
            // The JSON filter may have shortened the value.
            return Err(format!("annotation {name}: has at least {length} bytes, more than any valid value"));
        }
        // kirsa does not use IRSA's token lifetime and endpoint choice: its tokens live for one exchange, at the regional
        // endpoint. Both are validated all the same, to report typing errors.
        if let Some(value) = irsa("token-expiration") {
            seconds(value, &(Duration::from_secs(600)..=Duration::from_secs(86_400)))
                .map_err(irsa_error("token-expiration"))?;
        }
        if let Some(value) = irsa("sts-regional-endpoints") {
            one_of(value, &[("true", ()), ("false", ())]).map_err(irsa_error("sts-regional-endpoints"))?;
        }
        Ok(Some(Self {
            role: RoleArn::parse(role, defaults.store_arns).map_err(irsa_error("role-arn"))?,
            audience: irsa("audience")
                .map_or(Ok(defaults.audience.clone()), audience)
                .map_err(irsa_error("audience"))?,
            duration: own("session-duration")
                .map_or(Ok(defaults.duration), |value| seconds(value, &defaults.durations))
                .map_err(own_error("session-duration"))?,
            scope: own("session-scope")
                .map_or(Ok(defaults.scope), |value| {
                    one_of(value, &[("service-account", SessionScope::ServiceAccount), ("pod", SessionScope::Pod)])
                })
                .map_err(own_error("session-scope"))?,
            policy: own("session-policy").map(policy).transpose().map_err(own_error("session-policy"))?,
            policy_arns: own("session-policy-arns")
                .map_or(Ok(Vec::new()), policy_arns)
                .map_err(own_error("session-policy-arns"))?,
            require_imdsv2: own("require-imdsv2")
                .map_or(Ok(false), |value| one_of(value, &[("true", true), ("false", false)]))
                .map_err(own_error("require-imdsv2"))?,
        }))
    }
}

fn seconds(value: &str, range: &RangeInclusive<Duration>) -> Result<Duration, String> {
    let duration = value.parse().ok().map(Duration::from_secs).filter(|duration| range.contains(duration));
    duration.ok_or_else(|| {
        let (min, max) = (range.start().as_secs(), range.end().as_secs());
        format!("{value:?} must be a number of seconds from {min} to {max}")
    })
}

fn one_of<T: Copy>(value: &str, choices: &[(&str, T)]) -> Result<T, String> {
    let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
    let chosen = choices.iter().find(|(name, _)| *name == value);
    chosen.map(|(_, choice)| *choice).ok_or_else(|| format!("{value:?} must be {}", names.join(" or ")))
}

fn audience(value: &str) -> Result<String, String> {
    let ok = !value.is_empty() && value.chars().all(|c| c.is_ascii_graphic());
    ok.then(|| value.to_owned()).ok_or_else(|| format!("{value:?} must be one word, such as sts.amazonaws.com"))
}

/// Validates a session policy: <https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRoleWithWebIdentity.html>
/// (`Policy`).
fn policy(value: &str) -> Result<String, String> {
    if value.len() > 2_048 {
        return Err(format!("has {} characters; STS allows 2048", value.len()));
    }
    match serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(value) {
        Ok(_) => Ok(value.to_owned()),
        Err(error) => Err(format!("must be a JSON policy document ({error})")),
    }
}

/// Validates up to ten policy ARNs: <https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRoleWithWebIdentity.html>
/// (`PolicyArns`).
fn policy_arns(value: &str) -> Result<Vec<String>, String> {
    let arns: Vec<String> = value.split(',').map(|arn| arn.trim().to_owned()).collect();
    let well_formed = |arn: &String| {
        arn.starts_with("arn:")
            && arn.contains(":iam::")
            && arn.contains(":policy/")
            && arn.bytes().all(|b| b.is_ascii_graphic())
    };
    if arns.len() > 10 {
        return Err(format!("names {} policies; STS allows 10", arns.len()));
    }
    match arns.iter().find(|arn| !well_formed(arn)) {
        Some(arn) => Err(format!("{arn:?} must be arn:aws:iam::<account>:policy/<name>; separate several by commas")),
        None => Ok(arns),
    }
}

impl Defaults {
    /// Returns the name of the annotation that holds the role ARN.
    pub fn role_annotation(&self) -> String {
        format!("{}/role-arn", self.prefix)
    }
}

#[cfg(any(test, fuzzing))]
impl Defaults {
    pub(crate) fn sample() -> Self {
        Self {
            prefix: "eks.amazonaws.com".into(),
            audience: "sts.amazonaws.com".into(),
            duration: Duration::from_secs(3_600),
            durations: Duration::from_secs(1_800)..=Duration::from_secs(43_200),
            scope: SessionScope::ServiceAccount,
            store_arns: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLE: (&str, &str) = ("eks.amazonaws.com/role-arn", "arn:aws:iam::111122223333:role/reader");

    fn parse(annotations: &[(&str, &str)]) -> Result<Option<SessionAnnotations>, String> {
        SessionAnnotations::parse(&Account::from_annotations("u", annotations.iter().copied()), &Defaults::sample())
    }

    #[test]
    fn without_role_annotation_nothing_else_counts() {
        assert_eq!(parse(&[("kirsa.dev/session-duration", "soon")]), Ok(None));
    }

    #[test]
    fn annotations_override_the_defaults() {
        let annotations = parse(&[
            ROLE,
            ("eks.amazonaws.com/audience", "my-sts"),
            ("kirsa.dev/session-duration", "7200"),
            ("kirsa.dev/session-scope", "pod"),
            ("kirsa.dev/session-policy", r#"{"Version":"2012-10-17"}"#),
            ("kirsa.dev/session-policy-arns", "arn:aws:iam::aws:policy/A, arn:aws:iam::111122223333:policy/B"),
        ])
        .unwrap()
        .unwrap();
        assert_eq!(
            (annotations.audience.as_str(), annotations.duration, annotations.scope),
            ("my-sts", Duration::from_secs(7_200), SessionScope::Pod)
        );
        assert_eq!((annotations.policy.is_some(), annotations.policy_arns.len()), (true, 2));
    }

    #[test]
    fn malformed_annotation_names_expected_form() {
        for (annotation, value, expected) in [
            ("eks.amazonaws.com/role-arn", "reader", "must be arn:aws:iam::"),
            ("eks.amazonaws.com/audience", "a b", "one word"),
            ("eks.amazonaws.com/token-expiration", "1h", "from 600 to 86400"),
            ("eks.amazonaws.com/sts-regional-endpoints", "yes", "true or false"),
            ("kirsa.dev/session-duration", "900", "from 1800 to 43200"),
            ("kirsa.dev/session-scope", "node", "service-account or pod"),
            ("kirsa.dev/require-imdsv2", "yes", "true or false"),
            ("kirsa.dev/session-policy", "{", "JSON policy document"),
            ("kirsa.dev/session-policy-arns", "A", "must be arn:aws:iam::"),
        ] {
            let error = parse(&[ROLE, (annotation, value)]).unwrap_err();
            assert!(error.contains(annotation) && error.contains(expected), "{error}");
        }
    }
}
