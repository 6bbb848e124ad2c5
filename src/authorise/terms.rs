//! What a service account's annotations say, as IRSA defines them (amazon-eks-pod-identity-webhook, README) and as
//! kirsa adds to them. A malformed one is a refusal: nothing is guessed.

use std::{ops::RangeInclusive, time::Duration};

use super::{Account, RoleArn, Scope};

const KIRSA: &str = "kirsa.dev";

/// What holds where no annotation says otherwise.
#[derive(Debug, Clone)]
pub struct Defaults {
    /// What IRSA's annotations begin with.
    pub prefix: String,
    pub audience: String,
    pub duration: Duration,
    /// Durations that an annotation may choose from.
    pub durations: RangeInclusive<Duration>,
    pub scope: Scope,
    /// Whether role ARNs of S3-compatible stores are allowed.
    pub foreign_arns: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Terms {
    pub role: RoleArn,
    pub audience: String,
    pub duration: Duration,
    pub scope: Scope,
    pub policy: Option<String>,
    pub policy_arns: Vec<String>,
    pub require_imdsv2: bool,
}

/// In bytes: more than any value that is right. A session policy has 2,048 at most; of ARNs of policies there are ten.
const LONGEST: usize = 2_048;
const LONGEST_ARNS: usize = 8_192;

/// How long the value of an annotation may be; `None` of one that is not read.
pub(super) fn longest(annotation: &str, role_annotation: &str) -> Option<usize> {
    let (prefix, name) = annotation.rsplit_once('/')?;
    let irsa = role_annotation.rsplit_once('/').is_some_and(|(irsa, _)| prefix == irsa)
        && ["role-arn", "audience", "token-expiration", "sts-regional-endpoints"].contains(&name);
    let ours = prefix == KIRSA
        && ["session-duration", "session-scope", "session-policy", "session-policy-arns", "require-imdsv2"]
            .contains(&name);
    (irsa || ours).then_some(if name == "session-policy-arns" { LONGEST_ARNS } else { LONGEST })
}

impl Terms {
    /// `None`: the account has no role. The error names the annotation, its value and the right form.
    pub(super) fn read(account: &Account, defaults: &Defaults) -> Result<Option<Self>, String> {
        let irsa = |name: &str| account.annotation(&format!("{}/{name}", defaults.prefix));
        let ours = |name: &str| account.annotation(&format!("{KIRSA}/{name}"));
        let named = |prefix: &str, name: &str, wrong: String| format!("annotation {prefix}/{name}: {wrong}");
        let irsa_wrong = |name: &'static str| move |wrong| named(&defaults.prefix, name, wrong);
        let ours_wrong = |name: &'static str| move |wrong| named(KIRSA, name, wrong);

        let Some(role) = irsa("role-arn") else { return Ok(None) };
        if let Some((name, length)) = &account.too_long {
            return Err(format!("annotation {name}: has at least {length} bytes, more than any value that is right"));
        }
        // IRSA's lifetime of the token in the pod and its choice of endpoint: kirsa's token lives for one exchange, at
        // the regional endpoint. Both must be well-formed all the same, since a typing error is worth knowing of.
        if let Some(value) = irsa("token-expiration") {
            seconds(value, &(Duration::from_secs(600)..=Duration::from_secs(86_400)))
                .map_err(irsa_wrong("token-expiration"))?;
        }
        if let Some(value) = irsa("sts-regional-endpoints") {
            one_of(value, &[("true", ()), ("false", ())]).map_err(irsa_wrong("sts-regional-endpoints"))?;
        }
        Ok(Some(Self {
            role: RoleArn::parse(role, defaults.foreign_arns).map_err(irsa_wrong("role-arn"))?,
            audience: irsa("audience")
                .map_or(Ok(defaults.audience.clone()), audience)
                .map_err(irsa_wrong("audience"))?,
            duration: ours("session-duration")
                .map_or(Ok(defaults.duration), |value| seconds(value, &defaults.durations))
                .map_err(ours_wrong("session-duration"))?,
            scope: ours("session-scope")
                .map_or(Ok(defaults.scope), |value| {
                    one_of(value, &[("service-account", Scope::ServiceAccount), ("pod", Scope::Pod)])
                })
                .map_err(ours_wrong("session-scope"))?,
            policy: ours("session-policy").map(policy).transpose().map_err(ours_wrong("session-policy"))?,
            policy_arns: ours("session-policy-arns")
                .map_or(Ok(Vec::new()), policy_arns)
                .map_err(ours_wrong("session-policy-arns"))?,
            require_imdsv2: ours("require-imdsv2")
                .map_or(Ok(false), |value| one_of(value, &[("true", true), ("false", false)]))
                .map_err(ours_wrong("require-imdsv2"))?,
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

/// STS API Reference, AssumeRoleWithWebIdentity, Policy.
fn policy(value: &str) -> Result<String, String> {
    if value.len() > 2_048 {
        return Err(format!("has {} characters; STS allows 2048", value.len()));
    }
    match serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(value) {
        Ok(_) => Ok(value.to_owned()),
        Err(error) => Err(format!("must be a JSON policy document ({error})")),
    }
}

/// STS API Reference, AssumeRoleWithWebIdentity, PolicyArns: at most 10.
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
        Some(wrong) => {
            Err(format!("{wrong:?} must be arn:aws:iam::<account>:policy/<name>, several with commas between"))
        }
        None => Ok(arns),
    }
}

impl Defaults {
    /// Whose value is a service account's role.
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
            scope: Scope::ServiceAccount,
            foreign_arns: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLE: (&str, &str) = ("eks.amazonaws.com/role-arn", "arn:aws:iam::111122223333:role/reader");

    fn read(annotations: &[(&str, &str)]) -> Result<Option<Terms>, String> {
        Terms::read(&Account::of_annotations("u", annotations.iter().copied()), &Defaults::sample())
    }

    #[test]
    fn no_role_annotation_is_no_role_whatever_else_is_there() {
        assert_eq!(read(&[("kirsa.dev/session-duration", "soon")]), Ok(None));
    }

    #[test]
    fn annotations_override_the_defaults() {
        let terms = read(&[
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
            (terms.audience.as_str(), terms.duration, terms.scope),
            ("my-sts", Duration::from_secs(7_200), Scope::Pod)
        );
        assert_eq!((terms.policy.is_some(), terms.policy_arns.len()), (true, 2));
    }

    #[test]
    fn a_malformed_annotation_is_named_with_its_value_and_the_right_form() {
        for (annotation, value, right) in [
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
            let wrong = read(&[ROLE, (annotation, value)]).unwrap_err();
            assert!(wrong.contains(annotation) && wrong.contains(right), "{wrong}");
        }
    }
}
