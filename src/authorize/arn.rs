//! Strict parser for `arn:<partition>:iam::<account>:role/<path><name>`:
//! <https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_identifiers.html>.

use std::{fmt, sync::Arc};

/// Partitions of AWS. S3-compatible stores use other names, such as `minio`.
const PARTITIONS: [&str; 8] =
    ["aws", "aws-cn", "aws-us-gov", "aws-iso", "aws-iso-b", "aws-iso-e", "aws-iso-f", "aws-eusc"];

/// A validated role ARN.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RoleArn {
    arn: Arc<str>,
    account: Arc<str>,
    name: Arc<str>,
}

impl RoleArn {
    /// Parses an ARN. `store` allows the forms of S3-compatible stores: other partitions (`arn:minio:iam:::role/…`) and an
    /// empty account (Ceph: `arn:aws:iam:::role/…`).
    ///
    /// # Errors
    /// A message with the expected form.
    pub fn parse(arn: &str, store: bool) -> Result<Self, String> {
        let form = if store {
            "must be arn:<partition>:iam::[<account>]:role/<name>"
        } else {
            "must be arn:aws:iam::<12-digit account>:role/<name> (or of another AWS partition)"
        };
        Self::try_parse(arn, store).ok_or_else(|| format!("{arn:?} {form}"))
    }

    fn try_parse(arn: &str, store: bool) -> Option<Self> {
        let mut parts = arn.splitn(6, ':');
        let mut next = || parts.next();
        let ("arn", partition, "iam", "", account, resource) = (next()?, next()?, next()?, next()?, next()?, next()?)
        else {
            return None;
        };
        let lower = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let partition_ok =
            PARTITIONS.contains(&partition) || (store && !partition.is_empty() && partition.chars().all(lower));
        let account_ok =
            (account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit())) || (store && account.is_empty());
        let path = resource.strip_prefix("role/")?;
        let name = path.rsplit('/').next()?;
        let name_ok =
            (1..=64).contains(&name.len()) && name.chars().all(|c| c.is_ascii_alphanumeric() || "_+=,.@-".contains(c));
        // A path has at most 512 printable ASCII characters, and no empty segment.
        let path_ok = path.len() <= 512
            && path.bytes().all(|b| b.is_ascii_graphic())
            && path.split('/').all(|segment| !segment.is_empty());
        (partition_ok && account_ok && name_ok && path_ok).then(|| Self {
            arn: arn.into(),
            account: account.into(),
            name: name.into(),
        })
    }

    /// Returns the account's 12 digits; `None` for a store without accounts.
    pub fn account(&self) -> Option<&str> {
        (!self.account.is_empty()).then_some(&*self.account)
    }

    /// Returns the name that the role list shows to pods: the role's name without its path, with `=` replaced by `-`. boto2
    /// treats a name with `=` as an SSH key. Nothing is looked up by this name, since the service account decides the role.
    pub fn alias(&self) -> String {
        self.name.replace('=', "-")
    }

    /// Returns whether a pod may request the role by this name: its alias or its own name.
    pub fn matches_name(&self, name: &str) -> bool {
        name == &*self.name || (self.name.contains('=') && name == self.alias())
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn as_str(&self) -> &str {
        &self.arn
    }
}

impl fmt::Display for RoleArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.arn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_and_paths_are_parsed() {
        for (arn, account, alias) in [
            ("arn:aws:iam::111122223333:role/reader", Some("111122223333"), "reader"),
            ("arn:aws-cn:iam::111122223333:role/team/a/reader", Some("111122223333"), "reader"),
            ("arn:aws-us-gov:iam::111122223333:role/x=y+z", Some("111122223333"), "x-y+z"),
        ] {
            let role = RoleArn::parse(arn, false).unwrap();
            assert_eq!((role.account(), role.alias().as_str(), role.as_str()), (account, alias, arn));
            assert!(role.matches_name(alias) && role.matches_name(role.name()) && !role.matches_name("x"));
        }
    }

    #[test]
    fn store_arns_need_a_custom_endpoint() {
        for arn in ["arn:minio:iam:::role/idp_hash-1", "arn:aws:iam:::role/ceph"] {
            assert!(RoleArn::parse(arn, false).is_err(), "{arn}");
            assert_eq!(RoleArn::parse(arn, true).unwrap().account(), None, "{arn}");
        }
    }

    #[test]
    fn malformed_arn_error_names_expected_form() {
        for arn in [
            "",
            "reader",
            "arn:aws:iam::111122223333:user/reader",
            "arn:aws:iam::1111:role/reader",
            "arn:aws:iam::11112222333a:role/reader",
            "arn:aws:sts::111122223333:role/reader",
            "arn:aws:iam:eu-west-1:111122223333:role/reader",
            "arn:aws:iam::111122223333:role/",
            "arn:aws:iam::111122223333:role//reader",
            "arn:aws:iam::111122223333:role/reader/",
            "arn:aws:iam::111122223333:role/rea der",
            "arn:aws:iam::111122223333:role/reader\n",
            "arn:azure:iam::111122223333:role/reader",
            " arn:aws:iam::111122223333:role/reader",
        ] {
            let error = RoleArn::parse(arn, false).unwrap_err();
            assert!(error.contains("must be arn:aws:iam::"), "{arn}: {error}");
        }
        assert!(RoleArn::parse(&format!("arn:aws:iam::111122223333:role/{}", "x".repeat(65)), true).is_err());
    }
}
