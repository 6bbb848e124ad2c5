//! Role ARNs.

use crate::authorize::RoleArn;

pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (strict, lenient) = (RoleArn::parse(text, false), RoleArn::parse(text, true));
    match (strict, lenient) {
        (Err(wrong), Err(also)) => {
            super::assert_one_line(&wrong);
            super::assert_one_line(&also);
        }
        (Ok(_), Err(wrong)) => panic!("AWS accepts what a store rejects: {wrong}"),
        (strict, Ok(role)) => {
            assert_eq!(role.to_string(), text, "the role differs from its text");
            let account = role.account();
            assert!(account.is_none_or(|account| account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit())));
            assert!(strict.is_err() || account.is_some(), "an AWS role without an account");
            let (head, path) = text.split_once(":role/").unwrap();
            assert!(head.ends_with(&format!(":iam::{}", account.unwrap_or_default())), "{text}");
            assert!(path == role.name() || path.ends_with(&format!("/{}", role.name())), "{text}");
            let alias = role.alias();
            let allowed = |c: char| c.is_ascii_alphanumeric() || "_+,.@-".contains(c);
            assert!((1..=64).contains(&alias.len()) && alias.chars().all(allowed), "{alias:?}");
        }
    }
}
