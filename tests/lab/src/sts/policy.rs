//! The checks that STS makes on session policies. What a policy allows is nobody's business here.

use super::refusal::Refusal;

/// Inline and managed policies share this many characters.
const ALLOTTED: usize = 2048;

/// Returns the share of the allotted space in percent, as `PackedPolicySize` reports it.
pub(super) fn check(policy: Option<&str>, arns: &[String]) -> Result<Option<usize>, Refusal> {
    if policy.is_none() && arns.is_empty() {
        return Ok(None);
    }
    let mut size = 0;
    if let Some(policy) = policy {
        let document: serde_json::Value =
            serde_json::from_str(policy).map_err(|_| Refusal::by_code("MalformedPolicyDocument"))?;
        if !is_policy(&document) {
            return Err(Refusal::by_code("MalformedPolicyDocument"));
        }
        size += document.to_string().len();
    }
    if let Some(arn) = arns.iter().find(|arn| !is_policy_arn(arn)) {
        return Err(Refusal::validation(format!("ARN {arn} is not valid.")));
    }
    size += arns.iter().map(String::len).sum::<usize>();
    let percent = (size * 100).div_ceil(ALLOTTED);
    if percent > 100 {
        let message = format!("Packed size of session policy consumes {percent}% of allotted space.");
        return Err(Refusal::new("PackedPolicyTooLarge", message));
    }
    Ok(Some(percent))
}

fn is_policy(document: &serde_json::Value) -> bool {
    let is_statement = |s: &serde_json::Value| {
        matches!(s["Effect"].as_str(), Some("Allow" | "Deny"))
            && (s.get("Action").is_some() || s.get("NotAction").is_some())
            && (s.get("Resource").is_some() || s.get("NotResource").is_some())
    };
    let version = document.get("Version").is_none_or(|v| v == "2012-10-17" || v == "2008-10-17");
    version
        && match &document["Statement"] {
            serde_json::Value::Array(statements) => !statements.is_empty() && statements.iter().all(is_statement),
            statement => is_statement(statement),
        }
}

fn is_policy_arn(arn: &str) -> bool {
    let parts: Vec<&str> = arn.splitn(6, ':').collect();
    let [scheme, partition, service, region, account, resource] = parts[..] else { return false };
    let owner = account == "aws" || (account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit()));
    scheme == "arn"
        && partition.starts_with("aws")
        && service == "iam"
        && region.is_empty()
        && owner
        && resource.strip_prefix("policy/").is_some_and(|name| !name.is_empty())
}
