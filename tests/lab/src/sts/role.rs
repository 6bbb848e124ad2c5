//! IAM roles and their trust policies, in the shape that `aws iam get-role` prints them.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};

use super::token::Claims;

const DEFAULT_MAX_SESSION: u32 = 3600;

/// A role that can be assumed.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
pub struct Role {
    pub arn: String,
    #[serde(default = "default_max_session")]
    pub max_session_duration: u32,
    pub assume_role_policy_document: TrustPolicy,
}

fn default_max_session() -> u32 {
    DEFAULT_MAX_SESSION
}

impl Role {
    /// A role that trusts the tokens of `issuer` (its URL) for the audience of STS and a subject,
    /// which may hold `*` and `?`.
    pub fn trusting(arn: &str, issuer: &str, subject: &str) -> Self {
        let provider = host_path(issuer);
        let condition =
            |key: &str, value: &str| BTreeMap::from([(format!("{provider}:{key}"), OneOrMany::One(value.to_owned()))]);
        let principal = RoleArn::parse(arn).map_or_else(|_| "*".to_owned(), |arn| arn.provider(provider));
        let statement = Statement {
            sid: None,
            effect: Effect::Allow,
            principal: Principal { federated: OneOrMany::One(principal) },
            action: OneOrMany::One("sts:AssumeRoleWithWebIdentity".into()),
            condition: BTreeMap::from([
                (Operator::StringEquals, condition("aud", "sts.amazonaws.com")),
                (Operator::StringLike, condition("sub", subject)),
            ]),
        };
        Self {
            arn: arn.to_owned(),
            max_session_duration: DEFAULT_MAX_SESSION,
            assume_role_policy_document: TrustPolicy { version: None, statement: vec![statement] },
        }
    }

    pub fn max_session_duration(mut self, seconds: u32) -> Self {
        self.max_session_duration = seconds;
        self
    }

    /// Whether a token of the provider with that ARN may assume this role.
    pub(super) fn trusts(&self, provider_arn: &str, claims: &Claims) -> bool {
        let applies = |effect| {
            let statements = self.assume_role_policy_document.statement.iter();
            statements.filter(|s| s.effect == effect).any(|s| s.applies(provider_arn, claims))
        };
        applies(Effect::Allow) && !applies(Effect::Deny)
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
pub struct TrustPolicy {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    pub statement: Vec<Statement>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
pub struct Statement {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sid: Option<String>,
    pub effect: Effect,
    pub principal: Principal,
    pub action: OneOrMany,
    #[serde(default)]
    pub condition: BTreeMap<Operator, BTreeMap<String, OneOrMany>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Effect {
    Allow,
    Deny,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
pub struct Principal {
    pub federated: OneOrMany,
}

/// The operators that trust policies for service accounts use; a policy with another one does not load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Operator {
    StringEquals,
    StringLike,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn any(&self, accepts: impl Fn(&str) -> bool) -> bool {
        match self {
            Self::One(value) => accepts(value),
            Self::Many(values) => values.iter().any(|value| accepts(value)),
        }
    }
}

impl Statement {
    fn applies(&self, provider_arn: &str, claims: &Claims) -> bool {
        let acts = |action: &str| action == "*" || action == "sts:*" || action == "sts:AssumeRoleWithWebIdentity";
        self.action.any(acts)
            && self.principal.federated.any(|arn| arn == "*" || arn == provider_arn)
            && self.condition.iter().all(|(operator, keys)| {
                keys.iter().all(|(key, expected)| {
                    let actual = claims.condition_values(key);
                    actual.iter().any(|actual| expected.any(|pattern| operator.matches(pattern, actual)))
                })
            })
    }
}

impl Operator {
    fn matches(self, pattern: &str, actual: &str) -> bool {
        match self {
            Self::StringEquals => pattern == actual,
            Self::StringLike => like(pattern.as_bytes(), actual.as_bytes()),
        }
    }
}

/// `*` stands for any run of characters, `?` for exactly one.
fn like(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, rest) => rest.is_none(),
        (Some((b'*', after)), _) => (0..=text.len()).any(|skip| like(after, &text[skip..])),
        (Some((b'?', after)), Some((_, rest))) => like(after, rest),
        (Some((expected, after)), Some((actual, rest))) => expected == actual && like(after, rest),
        (Some(_), None) => false,
    }
}

/// The issuer as IAM writes it in provider ARNs and condition keys: without its scheme.
pub(super) fn host_path(issuer: &str) -> &str {
    issuer.strip_prefix("https://").or_else(|| issuer.strip_prefix("http://")).unwrap_or(issuer).trim_end_matches('/')
}

/// The parts of a role ARN that answers are made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RoleArn {
    pub(super) partition: String,
    pub(super) account: String,
    pub(super) name: String,
}

impl RoleArn {
    /// S3-compatible stores leave the account empty; whether that is allowed is the caller's question.
    pub(super) fn parse(arn: &str) -> anyhow::Result<Self> {
        let parts: Vec<&str> = arn.splitn(6, ':').collect();
        let [scheme, partition, service, region, account, resource] = parts[..] else { bail!("an ARN has six parts") };
        ensure!(scheme == "arn" && service == "iam" && region.is_empty() && !partition.is_empty(), "not an IAM ARN");
        ensure!(
            account.is_empty() || (account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit())),
            "an account has twelve digits"
        );
        let path = resource.strip_prefix("role/").context("not a role")?;
        let name = path.rsplit('/').next().unwrap_or_default();
        ensure!(!name.is_empty() && name.len() <= 64, "a role name has 1 to 64 characters");
        ensure!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+=,.@-".contains(&b)), "not a role name");
        Ok(Self { partition: partition.into(), account: account.into(), name: name.into() })
    }

    pub(super) fn provider(&self, host_path: &str) -> String {
        format!("arn:{}:iam::{}:oidc-provider/{host_path}", self.partition, self.account)
    }

    pub(super) fn session(&self, session_name: &str) -> String {
        format!("arn:{}:sts::{}:assumed-role/{}/{session_name}", self.partition, self.account, self.name)
    }
}
