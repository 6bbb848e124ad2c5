//! An API server that is away, in one of the ways that they are.

use anyhow::Result;
use nix::sys::signal::Signal;

use super::{ApiServer, binaries, spawn};

impl ApiServer {
    /// Connections are taken by the kernel, and nothing is ever answered, until [`ApiServer::resume`].
    pub fn pause(&self) -> Result<()> {
        self.process().signal(Signal::SIGSTOP)
    }

    pub fn resume(&self) -> Result<()> {
        self.process().signal(Signal::SIGCONT)
    }

    /// The same of etcd: the API server is there, and has nothing to say.
    pub fn pause_etcd(&self) -> Result<()> {
        self.etcd.signal(Signal::SIGSTOP)
    }

    pub fn resume_etcd(&self) -> Result<()> {
        self.etcd.signal(Signal::SIGCONT)
    }

    /// Connections are refused, until [`ApiServer::restart`].
    pub fn kill(&self) -> Result<()> {
        self.process().kill()
    }

    /// Another one with the same keys and the same etcd; returns when it is ready.
    pub fn restart(&self) -> Result<()> {
        let number = self.address.port() - super::PORT;
        let started = spawn(&binaries::locate()?, &self.folder, self.address, number, &[])?;
        *self.process() = started;
        self.wait_ready()
    }
}
