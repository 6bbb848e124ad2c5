//! Annotations of a service account, one per line: `name=value`.

use crate::{
    attribute::Workload,
    authorize::{Account, Defaults, Grant},
    refusal::Reason,
};

pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let annotations: Vec<(&str, &str)> = text.split('\n').filter_map(|line| line.split_once('=')).collect();
    let has = |name: &str| annotations.iter().any(|(known, _)| *known == name);
    for (store_arns, pod) in [(false, "pod-0"), (true, &"p".repeat(253))] {
        // A new account per round, since an account caches its parsed annotations.
        let account = Account::from_annotations("sa-uid", annotations.iter().copied());
        let defaults = Defaults { store_arns, ..Defaults::sample() };
        match Grant::from_account(Workload::sample(pod, "uid-a", "reader"), &account, &defaults) {
            Ok(grant) => {
                let key = grant.key();
                let value = annotations.iter().rev().find(|(name, _)| *name == "eks.amazonaws.com/role-arn").unwrap().1;
                assert_eq!(grant.role().as_str(), value, "not the annotated role");
                let allowed = |c: char| c.is_ascii_alphanumeric() || "_+=,.@-".contains(c);
                assert!((2..=64).contains(&key.session_name.len()) && key.session_name.chars().all(allowed), "{key:?}");
                assert!((1_800..=43_200).contains(&key.duration.as_secs()), "{key:?}");
                assert!(!key.audience.is_empty() && key.audience.bytes().all(|b| b.is_ascii_graphic()), "{key:?}");
                assert!(key.policy_arns.len() <= 10 && key.policy.as_ref().is_none_or(|policy| policy.len() <= 2_048));
                let scope = annotations.iter().rev().find(|(name, _)| *name == "kirsa.dev/session-scope");
                assert_eq!(key.pod.is_some(), scope.is_some_and(|(_, scope)| *scope == "pod"), "{text}");
            }
            Err(refusal) if refusal.reason == Reason::NoRole => assert!(!has("eks.amazonaws.com/role-arn"), "{text}"),
            Err(refusal) => {
                assert_eq!(refusal.reason, Reason::BadAnnotation, "{refusal}");
                assert!(refusal.detail.contains("annotation "), "{refusal}");
                super::assert_one_line(&refusal.detail);
            }
        }
    }
}
