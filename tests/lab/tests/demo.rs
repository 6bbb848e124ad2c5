//! `make demo` is what a newcomer sees first: it tells its story to the end, and nothing besides.

use std::process::Command;

use anyhow::{Result, ensure};

#[test]
fn the_demo_is_as_it_says_and_says_nothing_else() -> Result<()> {
    lab::sdk::prepare()?;
    let demo = Command::new(env!("CARGO_BIN_EXE_demo")).output()?;
    let (said, complained) = (String::from_utf8_lossy(&demo.stdout), String::from_utf8_lossy(&demo.stderr));
    ensure!(demo.status.success() && complained.is_empty(), "{said}\n{complained}");
    ensure!(said.trim_end().ends_with("Everything was as said, and nothing is left behind."), "{said}");
    ensure!(said.contains("13. "), "a step is missing:\n{said}");
    Ok(())
}
