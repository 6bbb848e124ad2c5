//! One named network namespace: run code and programs in it, set its links up, remove it.
//! Knows nothing about what it stands for.

use std::fs::{self, File};
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use std::{io, panic, thread};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::namespace;

#[derive(Debug)]
pub struct Netns {
    name: String,
    file: File,
}

impl Netns {
    /// Make a namespace that forwards packets and whose addresses are usable at once.
    pub fn create(name: &str) -> Result<Self> {
        namespace::ip(&format!("netns add {name}"))?;
        let path = path(name);
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        let netns = Self { name: name.into(), file };
        netns.sysctl("ipv4/ip_forward", "1")?;
        if namespace::has_ipv6() {
            netns.sysctl("ipv6/conf/default/accept_dad", "0")?;
            netns.sysctl("ipv6/conf/all/forwarding", "1")?;
        }
        netns.ip(["link set lo up"])?;
        Ok(netns)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> PathBuf {
        path(&self.name)
    }

    /// Run code in this namespace: on a thread of its own, since the namespace is a property of the thread.
    /// Sockets and processes made there stay there.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET)
                    .expect("root of the user namespace may enter its network namespaces");
                work()
            });
            thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
        })
    }

    /// Run a program in this namespace to its end.
    pub fn output(&self, command: &mut Command) -> io::Result<Output> {
        self.run(|| command.stdin(Stdio::null()).output())
    }

    /// Run a shell line in this namespace; its standard output, or an error with its standard error.
    pub fn shell(&self, line: &str) -> Result<String> {
        let output = self.output(Command::new("sh").args(["-c", line]))?;
        if !output.status.success() {
            bail!("{} in {}: {line}: {}", output.status, self.name, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    pub fn connect(&self, address: SocketAddr, within: Duration) -> io::Result<TcpStream> {
        self.run(|| TcpStream::connect_timeout(&address, within))
    }

    pub fn listen(&self, address: SocketAddr) -> io::Result<TcpListener> {
        self.run(|| TcpListener::bind(address))
    }

    /// Run `ip` commands in this namespace, all in one process.
    pub fn ip<S: AsRef<str>>(&self, commands: impl IntoIterator<Item = S>) -> Result<()> {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("ip")?;
        let mut script = String::new();
        for command in commands {
            script += command.as_ref();
            script.push('\n');
        }
        child.stdin.take().expect("stdin is piped").write_all(script.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("ip in {}: {}\n{script}", self.name, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/net/{name}");
        self.run(|| fs::write(&path, value)).with_context(|| format!("{path} in {}", self.name))
    }
}

impl Drop for Netns {
    /// The name goes now, the namespace with the last socket or process in it.
    fn drop(&mut self) {
        let _ = namespace::ip(&format!("netns del {}", self.name));
    }
}

fn path(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}
