//! `arn:<partition>:iam::<account>:role/<path><name>`, strictly (IAM User Guide, "IAM identifiers").

use std::{fmt, sync::Arc};

/// The partitions of AWS. S3-compatible stores have names of their own, such as `minio`.
const PARTITIONS: [&str; 8] =
    ["aws", "aws-cn", "aws-us-gov", "aws-iso", "aws-iso-b", "aws-iso-e", "aws-iso-f", "aws-eusc"];

/// A role's ARN that has been read and found well-formed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RoleArn {
    arn: Arc<str>,
    account: Arc<str>,
    name: Arc<str>,
}

impl RoleArn {
    /// `foreign` allows what S3-compatible stores use: other partitions (`arn:minio:iam:::role/…`) and no account
    /// (Ceph: `arn:aws:iam:::role/…`).
    ///
    /// # Errors
    /// What would be right.
    pub fn parse(arn: &str, foreign: bool) -> Result<Self, String> {
        let form = if foreign {
            "must be arn:<partition>:iam::[<account>]:role/<name>"
        } else {
            "must be arn:aws:iam::<12-digit account>:role/<name> (or of another AWS partition)"
        };
        Self::read(arn, foreign).ok_or_else(|| format!("{arn:?} {form}"))
    }

    fn read(arn: &str, foreign: bool) -> Option<Self> {
        let mut parts = arn.splitn(6, ':');
        let mut next = || parts.next();
        let ("arn", partition, "iam", "", account, resource) = (next()?, next()?, next()?, next()?, next()?, next()?)
        else {
            return None;
        };
        let lower = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let partition_ok =
            PARTITIONS.contains(&partition) || (foreign && !partition.is_empty() && partition.chars().all(lower));
        let account_ok =
            (account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit())) || (foreign && account.is_empty());
        let path = resource.strip_prefix("role/")?;
        let name = path.rsplit('/').next()?;
        let name_ok =
            (1..=64).contains(&name.len()) && name.chars().all(|c| c.is_ascii_alphanumeric() || "_+=,.@-".contains(c));
        // A path is printable ASCII, 512 characters at most, and has no empty segment.
        let path_ok = path.len() <= 512
            && path.bytes().all(|b| b.is_ascii_graphic())
            && path.split('/').all(|segment| !segment.is_empty());
        (partition_ok && account_ok && name_ok && path_ok).then(|| Self {
            arn: arn.into(),
            account: account.into(),
            name: name.into(),
        })
    }

    /// The account's 12 digits; `None` where the store has no accounts.
    pub fn account(&self) -> Option<&str> {
        (!self.account.is_empty()).then_some(&*self.account)
    }

    /// The name that pods are told: the role's, without its path. boto2 takes a name with `=` for an SSH key, so that
    /// becomes `-`; the service account decides the role, so nothing is looked up by this name.
    pub fn alias(&self) -> String {
        self.name.replace('=', "-")
    }

    /// Whether a pod may ask for it by this name: the one that it was told, or the role's own.
    pub fn answers_to(&self, name: &str) -> bool {
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
    fn every_partition_and_path_is_read() {
        for (arn, account, alias) in [
            ("arn:aws:iam::111122223333:role/reader", Some("111122223333"), "reader"),
            ("arn:aws-cn:iam::111122223333:role/team/a/reader", Some("111122223333"), "reader"),
            ("arn:aws-us-gov:iam::111122223333:role/x=y+z", Some("111122223333"), "x-y+z"),
        ] {
            let role = RoleArn::parse(arn, false).unwrap();
            assert_eq!((role.account(), role.alias().as_str(), role.as_str()), (account, alias, arn));
            assert!(role.answers_to(alias) && role.answers_to(role.name()) && !role.answers_to("x"));
        }
    }

    #[test]
    fn s3_compatible_stores_need_their_own_endpoint() {
        for arn in ["arn:minio:iam:::role/idp_hash-1", "arn:aws:iam:::role/ceph"] {
            assert!(RoleArn::parse(arn, false).is_err(), "{arn}");
            assert_eq!(RoleArn::parse(arn, true).unwrap().account(), None, "{arn}");
        }
    }

    #[test]
    fn anything_else_is_refused_with_the_right_form() {
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
            let wrong = RoleArn::parse(arn, false).unwrap_err();
            assert!(wrong.contains("must be arn:aws:iam::"), "{arn}: {wrong}");
        }
        assert!(RoleArn::parse(&format!("arn:aws:iam::111122223333:role/{}", "x".repeat(65)), true).is_err());
    }
}
