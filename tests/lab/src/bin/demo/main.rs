//! The main job, shown on this machine: three pods, a real redirect, an STS that checks what it is shown, and SDKs that
//! know nothing of any of it. No cluster, no AWS, no root; everything is gone when it ends.
//!
//! This file is the story; `steps` are its scenes, `site` is where they happen, `terminal` is who types, and `screen`
//! is how it looks.

mod screen;
mod site;
mod steps;
mod terminal;

use std::io;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use lab::sdk;

use screen::{Screen, Unmet};
use site::Site;

/// Shows kirsa's main job step by step, and fails if anything is not as it says.
#[derive(Parser)]
struct Args {
    /// Leave it running afterwards and tell how to enter a pod, until Ctrl-C.
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut screen = Screen::new();
    match demo(&mut screen, args.keep) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A screen that is gone, as in `demo | head`, cannot be told so.
            let _ = screen.failed(&error);
            ExitCode::FAILURE
        }
    }
}

fn demo(screen: &mut Screen, keep: bool) -> Result<()> {
    screen.title(
        "kirsa: pods ask the instance metadata service, and get their own role instead of the node's.",
        "No cluster, no AWS, no root: it all happens in namespaces of this program's own. STS and the node's own \
         metadata service are stand-ins at the wire; kirsa, the redirect, curl and the SDKs are real.",
    )?;
    let boto3 = install_boto3(screen)?;
    lab::namespace::enter();

    let mut site = Site::new()?;
    if let Err(error) = story(screen, &mut site, boto3) {
        screen.failed(&error)?;
        screen.details("the end of kirsa's log", &site.log_tail())?;
        // It may be what failed: that has been said.
        let _ = site.end();
        return Err(Unmet.into());
    }
    if keep {
        screen.end("Everything was as said.")?;
        return site.keep(screen);
    }
    site.end()?;
    screen.end("Everything was as said, and nothing is left behind.")?;
    Ok(())
}

fn story(screen: &mut Screen, site: &mut Site, boto3: Result<()>) -> Result<()> {
    steps::a_node_has_three_pods(screen, site)?;
    steps::kirsa_starts(screen, site)?;
    steps::a_pod_asks_with_imdsv2(screen, site)?;
    steps::a_pod_asks_with_imdsv1(screen, site)?;
    steps::sdks_act_as_their_service_accounts(screen, site)?;
    steps::so_does_boto3(screen, site, boto3)?;
    steps::nobody_gets_the_role_of_another(screen, site)?;
    steps::a_pod_without_a_role_gets_none(screen, site)?;
    steps::only_the_node_reaches_its_own_service(screen, site)?;
    steps::kirsa_counts(screen, site)?;
    steps::kirsa_keeps_an_audit_trail(screen, site)?;
    steps::a_killed_kirsa_does_not_open_the_way(screen, site)?;
    steps::a_new_one_goes_on(screen, site)
}

/// Before the program leaves for namespaces of its own, because this takes the network, once.
fn install_boto3(screen: &mut Screen) -> io::Result<Result<()>> {
    if !sdk::is_prepared() {
        screen.note("Getting boto3 from PyPI, once …")?;
    }
    Ok(sdk::prepare())
}
