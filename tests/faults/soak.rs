//! A short soak test. `make soak` runs the long one.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::soak::{Plan, run};

/// Runs everything that a node does concurrently for ten seconds. Covers IMDS-16 except latency, which the bench
/// measures.
#[test]
fn churning_pods_get_their_own_credentials() -> Result<()> {
    let during = Duration::from_secs(10);
    let report = run(env!("CARGO_BIN_EXE_kirsa"), &Plan { pods: 40, accounts: 15, churn: 4.0, session: 300, during })?;
    println!("{report}");
    ensure!(report.wrong_identities().is_empty(), "{:?}", report.wrong_identities());
    ensure!(report.canary_hits() == 0, "{report}");
    let (calls, failed) = report.calls();
    ensure!(calls > 40 && failed * 20 <= calls, "{report}");
    // One in a hundred STS responses is an error, and the last pod of an account may end during an exchange.
    let (issued, least) = report.exchanges();
    ensure!(issued as f64 <= least * 1.2 + 3.0, "{report}");
    ensure!(report.growth() < 4 << 10, "{report}");
    Ok(())
}
