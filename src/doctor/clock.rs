//! This node's clock, against those of the API server and of STS.

use super::finding::Finding;
use crate::clock::UnixTime;

/// STS and the API server refuse tokens and signatures beyond it.
const WRONG: u64 = 300;
/// A clock that is kept does not get that far.
const OFF: u64 = 60;

/// `theirs` comes from a `Date` header, in whole seconds, and may have been under way for a few.
pub(super) fn check(check: &'static str, whose: &str, theirs: Option<UnixTime>, now: UnixTime) -> Finding {
    let Some(theirs) = theirs else {
        return Finding::skipped(check, format!("{whose} does not say what time it has"));
    };
    let (off, way) = (now.0.abs_diff(theirs.0), if now > theirs { "ahead of" } else { "behind" });
    let fix = "set the clock of this node, and see why its time service does not (chronyc tracking, timedatectl)";
    if off > WRONG {
        let detail = format!("{off} s {way} that of {whose}: tokens and signatures are refused");
        Finding::failed(check, detail, fix)
    } else if off > OFF {
        Finding::warning(check, format!("{off} s {way} that of {whose}"), fix)
    } else {
        Finding::ok(check, format!("{off} s from that of {whose}"))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Verdict, *};

    #[test]
    fn a_minute_is_a_warning_and_five_a_failure_either_way() {
        let now = UnixTime(1_700_000_000);
        for (seconds, verdict) in [(60, Verdict::Ok), (61, Verdict::Warning), (301, Verdict::Failed)] {
            for theirs in [now.0 + seconds, now.0 - seconds] {
                assert_eq!(check("clock-sts", "STS", Some(UnixTime(theirs)), now).verdict, verdict, "{seconds}");
            }
        }
        assert_eq!(check("clock-sts", "STS", None, now).verdict, Verdict::Skipped);
    }
}
