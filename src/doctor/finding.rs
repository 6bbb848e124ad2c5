//! The result of one check: a verdict, the detail that explains it, and the fix.

use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    Ok,
    /// Works, but should be changed.
    Warning,
    /// Pods cannot get their credentials, or could get someone else's.
    Failed,
    /// Could not be checked, or does not apply to this node.
    Skipped,
}

impl Verdict {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Finding {
    /// Name from a fixed set, for scripts to select by.
    pub check: &'static str,
    pub verdict: Verdict,
    pub detail: String,
    /// Advice: the check or change that the operator should make.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Finding {
    pub(super) fn ok(check: &'static str, detail: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, detail: detail.into(), fix: None }
    }

    pub(super) fn skipped(check: &'static str, detail: impl Into<String>) -> Self {
        Self { verdict: Verdict::Skipped, ..Self::ok(check, detail) }
    }

    pub(super) fn warning(check: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warning, fix: Some(fix.into()), ..Self::ok(check, detail) }
    }

    pub(super) fn failed(check: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { verdict: Verdict::Failed, ..Self::warning(check, detail, fix) }
    }

    pub(super) fn with_fix(self, fix: impl Into<String>) -> Self {
        Self { fix: Some(fix.into()), ..self }
    }
}
