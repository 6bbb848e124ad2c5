//! Checks the policy routing rules that block the metadata addresses while rule sets are flushed.

use super::finding::Finding;
use crate::{
    config::Config,
    intercept::{Backend, rule::policy_routing_listing},
};

const CHECK: &str = "policy-routing";

pub(super) fn check(config: &Config) -> Option<Finding> {
    Some(match policy_routing_listing() {
        Ok(listing) => return judge(config.intercept, &listing),
        Err(_) if config.intercept == Backend::None => return None,
        Err(error) => Finding::skipped(CHECK, format!("policy routing rules cannot be listed: {error}")),
    })
}

fn judge(backend: Backend, listing: &[(String, bool)]) -> Option<Finding> {
    let (present, missing): (Vec<_>, Vec<_>) = listing.iter().partition(|(_, is_present)| *is_present);
    if backend == Backend::None {
        return present.first().map(|(rule, _)| {
            let detail = format!("--intercept none, but kirsa's policy routing rules exist, such as: {rule}");
            Finding::warning(CHECK, detail, "run kirsa uninstall: an agent with another --intercept left them behind")
        });
    }
    if missing.is_empty() {
        let detail = "policy routing blocks TCP port 80 of the metadata addresses while rule sets are flushed";
        return Some(Finding::ok(CHECK, detail));
    }
    let rules = missing.iter().map(|(rule, _)| rule.as_str()).collect::<Vec<_>>().join("; ");
    Some(Finding::failed(
        CHECK,
        format!("missing rules: {rules}"),
        "start the agent, which adds them within 2 s; if they disappear again, find the process that removes them \
         (systemd-networkd: set ManageForeignRoutingPolicyRules=no)",
    ))
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Verdict, *};

    #[test]
    fn missing_rules_fail_and_leftovers_warn() {
        let verdict = |backend, present: [bool; 2]| {
            judge(backend, &present.map(|is_present| ("ip rule".to_owned(), is_present))).map(|finding| finding.verdict)
        };
        assert_eq!(verdict(Backend::Auto, [true, true]), Some(Verdict::Ok));
        assert_eq!(verdict(Backend::Nft, [true, false]), Some(Verdict::Failed));
        assert_eq!(verdict(Backend::None, [true, false]), Some(Verdict::Warning));
        assert_eq!(verdict(Backend::None, [false, false]), None);
    }
}
