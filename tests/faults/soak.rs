//! A short soak: that it holds, and that it still works. `make soak` is the long one.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::soak::{Plan, run};

/// Everything that a node does, at the same time, for ten seconds. IMDS-16 but for the time, which is for the bench.
#[test]
fn pods_that_come_ask_and_go_get_their_own_credentials_and_no_more_exchanges_than_it_takes() -> Result<()> {
    let during = Duration::from_secs(10);
    let report = run(env!("CARGO_BIN_EXE_kirsa"), &Plan { pods: 40, accounts: 15, churn: 4.0, session: 300, during })?;
    println!("{report}");
    ensure!(report.wrong_identities().is_empty(), "{:?}", report.wrong_identities());
    ensure!(report.canary_hits() == 0, "{report}");
    let (calls, failed) = report.calls();
    ensure!(calls > 40 && failed * 20 <= calls, "{report}");
    // One in a hundred answers of STS is an error, and the last pod of an account may end in the middle of an exchange.
    let (issued, least) = report.exchanges();
    ensure!(issued as f64 <= least * 1.2 + 3.0, "{report}");
    ensure!(report.growth() < 4 << 10, "{report}");
    Ok(())
}
