//! Where a request without an IMDSv2 session token is refused. Service accounts may say so for their own pods
//! (`kirsa.dev/require-imdsv2`); what is here they cannot take back.

use crate::attribute::Workload;

/// Everywhere, or in some namespaces.
#[derive(Debug, Clone, Default)]
pub struct Required {
    pub everywhere: bool,
    pub namespaces: Vec<Namespaces>,
}

/// One namespace, or all that begin in the same way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespaces {
    beginning: String,
    open: bool,
}

impl Namespaces {
    /// A name as Kubernetes allows it (RFC 1123 label); a `*` at its end stands for any ending. `None` for anything
    /// else.
    pub fn parse(pattern: &str) -> Option<Self> {
        let (beginning, open) = pattern.strip_suffix('*').map_or((pattern, false), |beginning| (beginning, true));
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let whole = open || (!beginning.is_empty() && !beginning.ends_with('-'));
        (whole && beginning.len() <= 63 && !beginning.starts_with('-') && beginning.chars().all(allowed))
            .then(|| Self { beginning: beginning.to_owned(), open })
    }

    fn include(&self, namespace: &str) -> bool {
        if self.open { namespace.starts_with(&self.beginning) } else { namespace == self.beginning }
    }
}

impl Required {
    /// Of whoever is calling, as far as that is known.
    pub(super) fn of(&self, caller: Option<&Workload>) -> bool {
        let listed = |workload: &Workload| self.namespaces.iter().any(|of| of.include(workload.namespace()));
        self.everywhere || caller.is_some_and(listed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_a_name_or_a_beginning() {
        let includes = |pattern: &str, namespace: &str| Namespaces::parse(pattern).unwrap().include(namespace);
        assert!(includes("shop", "shop") && !includes("shop", "shop-2") && !includes("shop", "sho"));
        assert!(includes("team-*", "team-a") && includes("team-*", "team-") && !includes("team-*", "teams"));
        assert!(includes("*", "anything"));
        for wrong in ["", "Shop", "a_b", "-a", "a-", "a*b", "**", "a.b", " a", &"a".repeat(64)] {
            assert_eq!(Namespaces::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn it_is_required_of_known_callers_in_the_list_and_everywhere_of_anybody() {
        let pod = Workload::sample("a", "uid-a", "sa");
        let listed = Required { everywhere: false, namespaces: vec![Namespaces::parse("def*").unwrap()] };
        assert!(listed.of(Some(&pod)) && !listed.of(None));
        assert!(!Required::default().of(Some(&pod)));
        assert!(Required { everywhere: true, namespaces: Vec::new() }.of(None));
    }
}
