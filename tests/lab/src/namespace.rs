//! Moves the whole program into user, network, mount and pid namespaces of its own before it starts a
//! thread. Needs no root, and leaves nothing: the kernel ends the pid namespace with the program.
//! Knows nothing about nodes and pods; it only sets up the base namespace that they are attached to.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::{self, Command};
use std::sync::OnceLock;
use std::{env, fs};

use anyhow::{Context, Result, bail};
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getegid, geteuid};

use crate::netns::Netns;

/// Where servers in the program's own namespace listen: every node and pod has a route to it.
pub const BASE: Ipv4Addr = Ipv4Addr::new(10, 251, 0, 1);
pub const BASE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x251, 0, 0, 0, 0, 0, 1);

/// A folder of the program's own, in memory, that is gone with the program.
pub const STATE: &str = "/run/lab";

/// The process outside the pid namespace, by the number that the world outside knows it by.
static SUPERVISOR: OnceLock<u32> = OnceLock::new();

/// Put this once at the top of a test file: the test binary enters its namespaces before `main`.
#[macro_export]
macro_rules! enter {
    () => {
        #[$crate::ctor::ctor(unsafe, crate_path = $crate::ctor)]
        fn enter_namespaces() {
            $crate::namespace::enter();
        }
    };
}

/// Enter the namespaces. The first statement of `main` in a program that is not a test.
///
/// The calling process stays outside the pid namespace as a supervisor: it keeps the default action for
/// every signal, and its death, however it comes about, is the end of everything inside.
pub fn enter() {
    if let Err(error) = try_enter() {
        eprintln!("lab: {error:#}");
        process::exit(1);
    }
}

fn try_enter() -> Result<()> {
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID)
        .context(
            "this system does not let this user make user namespaces: see the sysctls user.max_user_namespaces, \
             kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns, or the container's \
             seccomp profile",
        )?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;

    SUPERVISOR.get_or_init(process::id);
    // SAFETY: the process has one thread yet, so the child may do whatever its parent could.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => supervise(child),
        ForkResult::Child => {
            set_pdeathsig(Signal::SIGKILL)?;
            mounts()?;
            base_network()
        }
    }
}

fn supervise(child: Pid) -> ! {
    let code = loop {
        match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, code)) => break code,
            Ok(WaitStatus::Signaled(_, signal, _)) => break 128 + signal as i32,
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(_) => break 1,
        }
    };
    // SAFETY: `_exit` runs no exit handlers; those belong to the program inside.
    unsafe { libc::_exit(code) }
}

fn mounts() -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("making mounts private")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("proc"), "/proc", Some("proc"), flags | MsFlags::MS_NOEXEC, none)
        .context("mounting /proc for the new pid namespace")?;
    // `ip netns` keeps its names here, iptables its lock.
    mount(Some("tmpfs"), "/run", Some("tmpfs"), flags, Some("mode=0755")).context("mounting a private /run")?;
    fs::create_dir(STATE)?;
    Ok(())
}

fn base_network() -> Result<()> {
    // Debian leaves /usr/sbin, where nft and iptables are, out of a user's path.
    let path = env::var("PATH").unwrap_or_default();
    // SAFETY: still one thread.
    unsafe { env::set_var("PATH", format!("{path}:/usr/sbin:/sbin")) };

    fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    ip("link set lo up")?;
    ip(&format!("addr add {BASE}/32 dev lo"))?;
    if has_ipv6() {
        fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0")?;
        fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
        ip(&format!("addr add {BASE6}/128 dev lo nodad"))?;
    }
    Ok(())
}

/// The shell line that takes a person on the same machine, but outside, into one of the program's namespaces.
pub fn way_in(netns: &Netns) -> String {
    let supervisor = SUPERVISOR.get().map_or_else(|| "PID".into(), u32::to_string);
    format!(
        "nsenter --target {supervisor} --user --preserve-credentials --mount --net ip netns exec {} sh",
        netns.name()
    )
}

/// Whether this kernel has IPv6.
pub fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// Run `ip` in the base namespace; arguments are separated by spaces.
pub fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .context("the lab needs `ip` (Debian: iproute2); tests/setup.sh installs what is missing")?;
    if !output.status.success() {
        bail!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
