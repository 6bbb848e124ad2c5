//! Role ARNs.

use crate::authorize::RoleArn;

pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (strict, foreign) = (RoleArn::parse(text, false), RoleArn::parse(text, true));
    match (strict, foreign) {
        (Err(wrong), Err(also)) => {
            super::is_one_line(&wrong);
            super::is_one_line(&also);
        }
        (Ok(_), Err(wrong)) => panic!("{wrong} as a store's, and not as AWS's"),
        (strict, Ok(role)) => {
            assert_eq!(role.to_string(), text, "a role is what was written");
            let account = role.account();
            assert!(account.is_none_or(|account| account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit())));
            assert!(strict.is_err() || account.is_some(), "AWS's roles have an account");
            let (head, path) = text.split_once(":role/").unwrap();
            assert!(head.ends_with(&format!(":iam::{}", account.unwrap_or_default())), "{text}");
            assert!(path == role.name() || path.ends_with(&format!("/{}", role.name())), "{text}");
            let alias = role.alias();
            let allowed = |c: char| c.is_ascii_alphanumeric() || "_+,.@-".contains(c);
            assert!((1..=64).contains(&alias.len()) && alias.chars().all(allowed), "what pods are told: {alias:?}");
        }
    }
}
