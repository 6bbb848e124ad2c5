//! Compares this node's clock with those of the API server and STS.

use std::time::Duration;

use super::finding::Finding;
use crate::clock::UnixTime;

/// Skew beyond which STS and the API server reject tokens and signatures.
const MAX_SKEW: Duration = Duration::from_secs(300);
/// Skew that a synchronized clock never reaches.
const SUSPICIOUS_SKEW: Duration = Duration::from_secs(60);

/// Compares `now` with `server_time`, which comes from a `Date` header: whole seconds, possibly a few seconds old.
pub(super) fn check(check: &'static str, server: &str, server_time: Option<UnixTime>, now: UnixTime) -> Finding {
    let Some(server_time) = server_time else {
        return Finding::skipped(check, format!("{server} did not send its time"));
    };
    let skew = Duration::from_secs(now.0.abs_diff(server_time.0));
    let (seconds, direction) = (skew.as_secs(), if now > server_time { "ahead of" } else { "behind" });
    let fix = "set this node's clock, and find out why its time service does not (chronyc tracking, timedatectl)";
    if skew > MAX_SKEW {
        let detail =
            format!("this node's clock is {seconds} s {direction} {server}: tokens and signatures are rejected");
        Finding::failed(check, detail, fix)
    } else if skew > SUSPICIOUS_SKEW {
        Finding::warning(check, format!("this node's clock is {seconds} s {direction} {server}"), fix)
    } else {
        Finding::ok(check, format!("this node's clock is within {seconds} s of {server}"))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Verdict, *};

    #[test]
    fn skew_over_a_minute_warns_over_five_fails() {
        let now = UnixTime(1_700_000_000);
        for (seconds, verdict) in [(60, Verdict::Ok), (61, Verdict::Warning), (301, Verdict::Failed)] {
            for server_time in [now.0 + seconds, now.0 - seconds] {
                assert_eq!(check("clock-sts", "STS", Some(UnixTime(server_time)), now).verdict, verdict, "{seconds}");
            }
        }
        assert_eq!(check("clock-sts", "STS", None, now).verdict, Verdict::Skipped);
    }
}
