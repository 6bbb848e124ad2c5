//! The request of `AssumeRoleWithWebIdentity` and the constraints on its form, which hold whoever asks.

use std::ops::RangeInclusive;

use jiff::Timestamp;

use super::{call::Call, protocol::Params, refusal::Refusal, token::Claims};

const DEFAULT_DURATION: u32 = 3600;
const DURATIONS: RangeInclusive<u32> = 900..=43_200;
const POLICY_ARNS: RangeInclusive<usize> = 0..=10;

/// The request as it came.
pub(super) struct Ask {
    role_arn: Option<String>,
    session_name: Option<String>,
    token: Option<String>,
    duration: Option<String>,
    pub(super) policy: Option<String>,
    pub(super) policy_arns: Vec<String>,
}

/// What has to be there, and is in form.
pub(super) struct Valid<'a> {
    pub(super) role_arn: &'a str,
    pub(super) session_name: &'a str,
    pub(super) token: &'a str,
    pub(super) duration: u32,
}

impl Ask {
    pub(super) fn read(params: &Params) -> Self {
        let owned = |name| params.get(name).map(str::to_owned);
        Self {
            role_arn: owned("RoleArn"),
            session_name: owned("RoleSessionName"),
            token: owned("WebIdentityToken"),
            duration: owned("DurationSeconds"),
            policy: owned("Policy"),
            policy_arns: params.members("PolicyArns", "arn"),
        }
    }

    pub(super) fn role(&self) -> &str {
        self.role_arn.as_deref().unwrap_or_default()
    }

    /// The entry in the call log.
    pub(super) fn call(&self) -> Call {
        Call {
            at: Timestamp::now(),
            role_arn: self.role().to_owned(),
            session_name: self.session_name.clone().unwrap_or_default(),
            duration_seconds: self.duration.clone(),
            policy: self.policy.clone(),
            policy_arns: self.policy_arns.clone(),
            claims: self.token.as_deref().and_then(|token| Claims::read(token).ok()),
            outcome: None,
            decided: None,
        }
    }

    pub(super) fn validate(&self) -> Result<Valid<'_>, Refusal> {
        let mut violations = Violations::default();
        let role_arn = violations.required("roleArn", self.role_arn.as_deref(), 20..=2048);
        let session_name = violations.required("roleSessionName", self.session_name.as_deref(), 2..=64);
        if !session_name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+=,.@-".contains(&b)) {
            let constraint = r"satisfy regular expression pattern: [\w+=,.@-]*";
            violations.add("roleSessionName", session_name, constraint);
        }
        let token = violations.required("webIdentityToken", self.token.as_deref(), 4..=20_000);
        if let Some(policy) = &self.policy {
            violations.length("policy", policy, 1..=2048);
        }
        if !POLICY_ARNS.contains(&self.policy_arns.len()) {
            let constraint = format!("have length less than or equal to {}", POLICY_ARNS.end());
            violations.add("policyArns", "[...]", &constraint);
        }
        let duration = self.duration.as_deref().map_or(DEFAULT_DURATION, |given| violations.duration(given));
        violations.refuse()?;
        Ok(Valid { role_arn, session_name, token, duration })
    }
}

/// AWS names all that is wrong at once.
#[derive(Default)]
struct Violations(Vec<String>);

impl Violations {
    fn add(&mut self, field: &str, value: &str, constraint: &str) {
        self.0.push(format!("Value '{value}' at '{field}' failed to satisfy constraint: Member must {constraint}"));
    }

    fn required<'a>(&mut self, field: &str, value: Option<&'a str>, range: RangeInclusive<usize>) -> &'a str {
        match value {
            Some(value) => {
                self.length(field, value, range);
                value
            }
            None => {
                self.0.push(format!("Value null at '{field}' failed to satisfy constraint: Member must not be null"));
                ""
            }
        }
    }

    fn length(&mut self, field: &str, value: &str, range: RangeInclusive<usize>) {
        let length = value.chars().count();
        // A token is a secret, even one that is too long.
        let shown = if field == "webIdentityToken" { "***" } else { value };
        if length < *range.start() {
            self.add(field, shown, &format!("have length greater than or equal to {}", range.start()));
        }
        if length > *range.end() {
            self.add(field, shown, &format!("have length less than or equal to {}", range.end()));
        }
    }

    fn duration(&mut self, given: &str) -> u32 {
        match given.parse() {
            Ok(seconds) if seconds < *DURATIONS.start() => {
                let constraint = format!("have value greater than or equal to {}", DURATIONS.start());
                self.add("durationSeconds", given, &constraint);
                seconds
            }
            Ok(seconds) if seconds > *DURATIONS.end() => {
                let constraint = format!("have value less than or equal to {}", DURATIONS.end());
                self.add("durationSeconds", given, &constraint);
                seconds
            }
            Ok(seconds) => seconds,
            Err(_) => {
                self.add("durationSeconds", given, "be a number");
                DEFAULT_DURATION
            }
        }
    }

    fn refuse(self) -> Result<(), Refusal> {
        let errors = match self.0.len() {
            0 => return Ok(()),
            1 => "1 validation error".to_owned(),
            count => format!("{count} validation errors"),
        };
        Err(Refusal::validation(format!("{errors} detected: {}", self.0.join("; "))))
    }
}
