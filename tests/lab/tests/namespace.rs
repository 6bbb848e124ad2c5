//! A program of the lab leaves nothing behind, however it ends. It starts itself once more to watch that.

use std::env;
use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::namespace;
use lab::net::{Node, Shape};
use lab::poll::poll;
use lab::process::Process;
use nix::sys::signal::Signal;

lab::enter!();

const PATIENCE: Duration = Duration::from_secs(10);

/// Start this program again, running nothing but `test`.
fn again(test: &str) -> Result<Process> {
    // Whoever runs the tests under nohup has SIGHUP ignored, which is inherited.
    let mut command = Command::new("env");
    command.arg("--default-signal").arg(env::current_exe()?).args(["--exact", test, "--ignored", "--nocapture"]);
    Process::spawn(None, test, command)
}

fn hang() -> ! {
    loop {
        thread::park();
    }
}

/// Every process that this program can see, those in its children's namespaces included.
fn processes(name: &str) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir("/proc")? {
        // It may be gone again.
        let command = fs::read_to_string(entry?.path().join("cmdline")).unwrap_or_default();
        count += usize::from(command.contains(name));
    }
    Ok(count)
}

#[test]
#[ignore = "started by the tests below"]
fn a_program_with_a_child_that_ignores_signals() -> Result<()> {
    Command::new("sh").args(["-c", "trap '' TERM INT HUP; echo started; while :; do sleep 4711; done"]).spawn()?;
    hang()
}

#[test]
#[ignore = "started by the tests below"]
#[expect(clippy::zombie_processes, reason = "what becomes of it is the question")]
fn a_program_that_panics() {
    Command::new("sleep").arg("4712").spawn().expect("sleep is everywhere");
    println!("started");
    panic!("as it should");
}

#[test]
fn nothing_survives_a_signal() -> Result<()> {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGKILL] {
        let mut program = again("a_program_with_a_child_that_ignores_signals")?;
        program.wait_for_line(PATIENCE, |line| line.ends_with("started"))?;
        ensure!(processes("4711")? > 0);
        program.signal(signal)?;
        program.wait(PATIENCE)?;
        poll("an empty namespace", PATIENCE, || (processes("4711").ok()? == 0).then_some(()))?;
    }
    Ok(())
}

#[test]
fn nothing_survives_a_panic_and_the_exit_code_tells_it() -> Result<()> {
    let mut program = again("a_program_that_panics")?;
    program.wait_for_line(PATIENCE, |line| line.ends_with("started"))?;
    ensure!(program.wait(PATIENCE)?.code() == Some(101), "the test harness's exit code");
    poll("an empty namespace", PATIENCE, || (processes("4712").ok()? == 0).then_some(()))
}

#[test]
#[ignore = "started by the test below"]
fn a_program_with_a_pod() -> Result<()> {
    let node = Node::new()?;
    let pod = node.pod("p", Shape::Bridge)?;
    println!("{} {}", pod.ip(), namespace::way_in(pod.netns()));
    hang()
}

#[test]
fn a_person_finds_the_way_in() -> Result<()> {
    let program = again("a_program_with_a_pod")?;
    let line = program.wait_for_line(PATIENCE, |line| line.ends_with("sh"))?;
    let (before, way_in) = line.split_once(" nsenter").context("a shell line")?;
    let ip = before.rsplit(' ').next().context("an address")?;
    let output = Command::new("sh").args(["-c", &format!("nsenter{way_in} -c 'ip -o addr'")]).output()?;
    ensure!(String::from_utf8_lossy(&output.stdout).contains(ip), "{ip}: {output:?}");
    Ok(())
}

#[test]
fn tests_can_be_listed() -> Result<()> {
    let output = Command::new(env::current_exe()?).arg("--list").output()?;
    ensure!(output.status.success() && String::from_utf8(output.stdout)?.contains("tests_can_be_listed: test"));
    Ok(())
}

#[test]
fn without_user_namespaces_one_sentence_says_so() -> Result<()> {
    let exe = env::current_exe()?;
    let line = format!("echo 0 > /proc/sys/user/max_user_namespaces; exec {}", exe.display());
    let output = Command::new("unshare").args(["--user", "--map-root-user", "sh", "-c", &line]).output()?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(1) && said.lines().count() == 1, "{said}");
    said.strip_prefix("lab: this system does not let this user make user namespaces").context(said.clone())?;
    Ok(())
}
