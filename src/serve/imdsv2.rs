//! The node's IMDSv2 policy: where requests without an IMDS token are refused. A service account can require IMDSv2 for
//! its own pods (`kirsa.dev/require-imdsv2`), but cannot relax this policy.

use crate::attribute::Workload;

/// Requires IMDSv2 on the whole node, or in some namespaces.
#[derive(Debug, Clone, Default)]
pub struct RequireImdsV2 {
    pub everywhere: bool,
    pub namespaces: Vec<NamespacePattern>,
}

/// The name of a namespace, or a prefix of names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamespacePattern {
    prefix: String,
    wildcard: bool,
}

impl NamespacePattern {
    /// Parses an RFC 1123 label, as Kubernetes requires for names of namespaces; a trailing `*` matches any suffix.
    /// Returns `None` for anything else.
    pub fn parse(pattern: &str) -> Option<Self> {
        let (prefix, wildcard) = pattern.strip_suffix('*').map_or((pattern, false), |prefix| (prefix, true));
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let complete = wildcard || (!prefix.is_empty() && !prefix.ends_with('-'));
        (complete && prefix.len() <= 63 && !prefix.starts_with('-') && prefix.chars().all(allowed))
            .then(|| Self { prefix: prefix.to_owned(), wildcard })
    }

    fn matches(&self, namespace: &str) -> bool {
        if self.wildcard { namespace.starts_with(&self.prefix) } else { namespace == self.prefix }
    }
}

impl RequireImdsV2 {
    /// Returns whether this pod needs an IMDS token.
    pub(super) fn applies_to(&self, workload: &Workload) -> bool {
        self.everywhere || self.namespaces.iter().any(|pattern| pattern.matches(workload.namespace()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pattern_is_name_or_prefix() {
        let matches = |pattern: &str, namespace: &str| NamespacePattern::parse(pattern).unwrap().matches(namespace);
        assert!(matches("shop", "shop") && !matches("shop", "shop-2") && !matches("shop", "sho"));
        assert!(matches("team-*", "team-a") && matches("team-*", "team-") && !matches("team-*", "teams"));
        assert!(matches("*", "anything"));
        for wrong in ["", "Shop", "a_b", "-a", "a-", "a*b", "**", "a.b", " a", &"a".repeat(64)] {
            assert_eq!(NamespacePattern::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn policy_applies_to_listed_namespaces_or_all() {
        let pod = Workload::sample("a", "uid-a", "sa");
        let namespaces = |pattern| NamespacePattern::parse(pattern).into_iter().collect();
        assert!(RequireImdsV2 { everywhere: false, namespaces: namespaces("def*") }.applies_to(&pod));
        assert!(!RequireImdsV2 { everywhere: false, namespaces: namespaces("other") }.applies_to(&pod));
        assert!(!RequireImdsV2::default().applies_to(&pod));
        assert!(RequireImdsV2 { everywhere: true, namespaces: Vec::new() }.applies_to(&pod));
    }
}
