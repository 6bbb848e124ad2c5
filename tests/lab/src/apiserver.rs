//! A real kube-apiserver with its etcd, in the base namespace: every node and pod of the lab reaches it. One for the
//! whole program, and others for tests that stop theirs. Knows nothing about kirsa but what any client of the API
//! server needs.

use std::fs::{self, DirBuilder};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::{Value, json};

use crate::namespace::{BASE, STATE};
use crate::poll::poll;
use crate::process::Process;

mod binaries;
mod manifests;
mod objects;
mod outage;
mod pki;
mod resigned;

pub const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// Of the first one; the others follow.
const PORT: u16 = 6443;
const ETCD_PORT: u16 = 2379;
/// A cold start takes 3 s on an idle machine.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug)]
pub struct ApiServer {
    address: SocketAddr,
    folder: PathBuf,
    admin: PathBuf,
    process: Mutex<Process>,
    etcd: Process,
}

impl ApiServer {
    /// The program's API server; the first caller waits for its start.
    pub fn get() -> Result<&'static Self> {
        static SERVER: OnceLock<Result<ApiServer>> = OnceLock::new();
        SERVER.get_or_init(|| Self::start(0, &[])).as_ref().map_err(|error| anyhow!("the API server: {error:#}"))
    }

    /// One more, with an etcd of its own.
    pub fn another() -> Result<Self> {
        Self::another_with(&[])
    }

    /// The same with flags of its own.
    pub fn another_with(flags: &[&str]) -> Result<Self> {
        static NEXT: AtomicU16 = AtomicU16::new(1);
        Self::start(NEXT.fetch_add(1, Ordering::Relaxed), flags)
    }

    fn start(number: u16, flags: &[&str]) -> Result<Self> {
        let binaries = binaries::locate()?;
        let folder = Path::new(STATE).join(format!("apiserver-{number}"));
        DirBuilder::new().mode(0o700).create(&folder)?;
        pki::create(&folder, IpAddr::V4(BASE))?;

        let clients = format!("http://127.0.0.1:{}", etcd_port(number));
        let mut etcd = Command::new(binaries.join("etcd"));
        etcd.arg("--data-dir").arg(folder.join("etcd")).args([
            format!("--listen-client-urls={clients}"),
            format!("--advertise-client-urls={clients}"),
            format!("--listen-peer-urls=http://127.0.0.1:{}", etcd_port(number) + 1),
            "--unsafe-no-fsync".into(),
        ]);
        let etcd = Process::spawn(None, "etcd", etcd)?;
        let address = (BASE, PORT + number).into();
        let process = Mutex::new(spawn(&binaries, &folder, address, number, flags)?);
        let admin = json!({"client-certificate": folder.join("admin.crt"), "client-key": folder.join("admin.key")});
        let admin = write_kubeconfig(&folder, address, "admin", admin)?;
        let server = Self { address, folder, admin, process, etcd };
        server.wait_ready()?;
        Ok(server)
    }

    /// On a thread of its own, since the caller may be inside a runtime already.
    fn wait_ready(&self) -> Result<()> {
        thread::scope(|scope| scope.spawn(|| self.wait_ready_blocking()).join().expect("no panic in there"))
    }

    fn wait_ready_blocking(&self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(self.client())?;
        let ready = poll("kube-apiserver ready", PATIENCE, || {
            let request = http::Request::get("/readyz").body(Vec::new()).expect("a constant request");
            if runtime.block_on(client.request_text(request)).is_ok() {
                return Some(Ok(()));
            }
            let process = self.process();
            let dead = [&*process, &self.etcd].into_iter().find(|process| process.ended())?;
            let lines = dead.lines();
            Some(Err(anyhow!("it ended:\n  {}", lines[lines.len().saturating_sub(20)..].join("\n  "))))
        });
        ready.and_then(|outcome| outcome)?;
        runtime.block_on(self.publish_jwks(client))
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.address())
    }

    /// The certificate, as a PEM file, that its clients have to trust.
    pub fn ca(&self) -> PathBuf {
        self.folder.join("ca.crt")
    }

    /// The kubeconfig of an administrator: for the lab's own calls, or for `kubectl`.
    pub fn admin_kubeconfig(&self) -> &Path {
        &self.admin
    }

    /// An administrator's client. It belongs to the runtime that it was made in: one per test, not one for all.
    pub async fn client(&self) -> Result<Client> {
        client_of(&self.admin).await
    }

    /// The keys that tokens of this cluster's service accounts are signed with. Everybody may read them, as on EKS.
    pub async fn jwks(&self) -> Result<Value> {
        let request = http::Request::get("/openid/v1/jwks").body(Vec::new())?;
        let text = self.client().await?.request_text(request).await?;
        Ok(serde_json::from_str(&text)?)
    }

    /// A kubeconfig for the holder of `token`.
    pub fn token_kubeconfig(&self, name: &str, token: &str) -> Result<PathBuf> {
        write_kubeconfig(&self.folder, self.address, name, json!({ "token": token }))
    }

    fn process(&self) -> MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// In the numbers of the ports, for clients and for peers.
fn etcd_port(number: u16) -> u16 {
    ETCD_PORT + 2 * number
}

fn spawn(binaries: &Path, folder: &Path, address: SocketAddr, number: u16, flags: &[&str]) -> Result<Process> {
    let mut apiserver = Command::new(binaries.join("kube-apiserver"));
    apiserver.current_dir(folder).args([
        format!("--bind-address={}", address.ip()),
        format!("--advertise-address={}", address.ip()),
        format!("--secure-port={}", address.port()),
        format!("--etcd-servers=http://127.0.0.1:{}", etcd_port(number)),
        format!("--service-account-issuer={ISSUER}"),
        "--service-cluster-ip-range=10.96.0.0/16".into(),
        "--tls-cert-file=server.crt".into(),
        "--tls-private-key-file=server.key".into(),
        "--client-ca-file=ca.crt".into(),
        "--service-account-key-file=sa.pub".into(),
        "--service-account-signing-key-file=sa.key".into(),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        "--allow-privileged=true".into(),
    ]);
    apiserver.args(flags);
    Process::spawn(None, "kube-apiserver", apiserver)
}

/// A client as a kubeconfig describes it.
pub async fn client_of(kubeconfig: &Path) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

fn write_kubeconfig(folder: &Path, address: SocketAddr, name: &str, user: Value) -> Result<PathBuf> {
    let ca = folder.join("ca.crt");
    let kubeconfig = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": "lab",
            "cluster": {"server": format!("https://{address}"), "certificate-authority": ca},
        }],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": name}}],
        "current-context": "lab",
    });
    let path = folder.join(format!("{name}.kubeconfig"));
    fs::write(&path, kubeconfig.to_string()).with_context(|| path.display().to_string())?;
    Ok(path)
}
