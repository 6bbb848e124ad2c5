//! The records that libcni leaves on a node when a CNI plugin has attached a pod, and every way in which
//! they can be wrong. Knows the files, not who reads them.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::net::{Address, Node, Pod, Shape};

/// The network's name in the file names.
const NETWORK: &str = "kit";

/// What the container runtime passes to the plugin about a pod.
#[derive(Clone, Debug)]
pub struct Sandbox {
    pub namespace: String,
    pub pod: String,
    pub uid: String,
    /// Of the sandbox container: 64 hexadecimal digits.
    pub id: String,
}

/// The folder `/var/lib/cni/results` of one node.
#[derive(Debug)]
pub struct Results {
    folder: PathBuf,
}

impl Sandbox {
    /// A first sandbox of that pod.
    pub fn new(namespace: &str, pod: &str, uid: &str) -> Self {
        Self { namespace: namespace.into(), pod: pod.into(), uid: uid.into(), id: String::new() }.restarted(0)
    }

    /// Another sandbox of the same pod: the runtime makes one when the first has died.
    pub fn restarted(&self, attempt: u32) -> Self {
        let digits: String = self.uid.chars().filter(char::is_ascii_hexdigit).collect();
        Self { id: format!("{digits:0>56}{attempt:08x}"), ..self.clone() }
    }
}

impl Node {
    /// Its records; the folder is made on first use, as the container runtime does.
    pub fn cni_results(&self) -> Result<Results> {
        let folder = self.state().join("cni/results");
        DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        Ok(Results { folder })
    }
}

impl Results {
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What is left by CNI ADD: a record for `eth0` and one for the loopback interface.
    pub fn add(&self, sandbox: &Sandbox, pod: &Pod) -> Result<()> {
        let mut interfaces = vec![
            json!({"mac": pod.host_mac(), "name": pod.host_interface()}),
            json!({"mac": pod.mac(), "name": "eth0", "sandbox": pod.netns().path()}),
        ];
        if pod.shape() == Shape::Bridge {
            interfaces.insert(0, json!({"mac": "aa:56:81:1c:cf:9b", "name": "cni0"}));
        }
        let record = record(sandbox, pod.address(), Value::Array(interfaces), &pod.netns().path());
        self.write(&file_name(sandbox), record.to_string().as_bytes())?;
        let loopback = loopback_record(sandbox, &pod.netns().path());
        self.write(&loopback_file_name(sandbox), loopback.to_string().as_bytes())
    }

    /// A record without a pod behind it: of a pod of another name, of an address that is somebody else's.
    pub fn add_forged(&self, sandbox: &Sandbox, address: Address) -> Result<()> {
        let netns = Path::new("/run/netns").join(&sandbox.id);
        let interfaces = json!([
            {"mac": "66:44:da:dc:12:6f", "name": "veth0"},
            {"mac": "6e:25:65:ff:9c:cd", "name": "eth0", "sandbox": netns},
        ]);
        let record = record(sandbox, address, interfaces, &netns);
        self.write(&file_name(sandbox), record.to_string().as_bytes())
    }

    /// What CNI DEL takes away.
    pub fn remove(&self, sandbox: &Sandbox) -> Result<()> {
        for name in [file_name(sandbox), loopback_file_name(sandbox)] {
            match fs::remove_file(self.folder.join(&name)) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                other => other.with_context(|| name)?,
            }
        }
        Ok(())
    }

    /// Date a record back, as if it had been left behind by a reboot.
    pub fn age(&self, sandbox: &Sandbox, modified: SystemTime) -> Result<()> {
        let file = OpenOptions::new().write(true).open(self.folder.join(file_name(sandbox)))?;
        Ok(file.set_modified(modified)?)
    }

    /// Cut a record short, as a crash while writing does.
    pub fn truncate(&self, sandbox: &Sandbox) -> Result<()> {
        let file = OpenOptions::new().write(true).open(self.folder.join(file_name(sandbox)))?;
        let length = file.metadata()?.len();
        Ok(file.set_len(length / 2)?)
    }

    /// Any other file: of another program, huge, not JSON.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        let path = self.folder.join(name);
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
        file.and_then(|mut file| file.write_all(content)).with_context(|| path.display().to_string())
    }
}

fn file_name(sandbox: &Sandbox) -> String {
    format!("{NETWORK}-{}-eth0", sandbox.id)
}

fn loopback_file_name(sandbox: &Sandbox) -> String {
    format!("cni-loopback-{}-lo", sandbox.id)
}

fn record(sandbox: &Sandbox, address: Address, interfaces: Value, netns: &Path) -> Value {
    let pods_end = interfaces.as_array().map_or(0, |all| all.len() - 1);
    let mut ips =
        vec![json!({"address": format!("{}/24", address.v4), "gateway": "10.244.0.1", "interface": pods_end})];
    if let Some(v6) = address.v6 {
        ips.push(json!({"address": format!("{v6}/64"), "gateway": "fd00:244::1", "interface": pods_end}));
    }
    json!({
        "kind": "cniCacheV1",
        "containerId": sandbox.id,
        "config": "eyJjbmlWZXJzaW9uIjoiMS4wLjAiLCJuYW1lIjoia2l0IiwicGx1Z2lucyI6W3sidHlwZSI6InB0cCJ9XX0K",
        "ifName": "eth0",
        "networkName": NETWORK,
        "netns": netns,
        "cniArgs": cni_args(sandbox),
        "capabilityArgs": capability_args(sandbox),
        "result": {"cniVersion": "1.0.0", "interfaces": interfaces, "ips": ips, "routes": [{"dst": "0.0.0.0/0"}]},
    })
}

fn loopback_record(sandbox: &Sandbox, netns: &Path) -> Value {
    json!({
        "kind": "cniCacheV1",
        "containerId": sandbox.id,
        "config": "eyJjbmlWZXJzaW9uIjoiMC4zLjEiLCJuYW1lIjoiY25pLWxvb3BiYWNrIiwicGx1Z2lucyI6W3sidHlwZSI6Imxvb3BiYWNrIn1dfQo=",
        "ifName": "lo",
        "networkName": "cni-loopback",
        "netns": netns,
        "cniArgs": cni_args(sandbox),
        "capabilityArgs": capability_args(sandbox),
        "result": {
            "cniVersion": "0.3.1",
            "dns": {},
            "interfaces": [{"mac": "00:00:00:00:00:00", "name": "lo", "sandbox": netns}],
            "ips": [
                {"address": "127.0.0.1/8", "interface": 0, "version": ""},
                {"address": "::1/128", "interface": 0, "version": ""},
            ],
        },
    })
}

fn cni_args(sandbox: &Sandbox) -> Value {
    json!([
        ["K8S_POD_INFRA_CONTAINER_ID", sandbox.id],
        ["K8S_POD_UID", sandbox.uid],
        ["IgnoreUnknown", "1"],
        ["K8S_POD_NAMESPACE", sandbox.namespace],
        ["K8S_POD_NAME", sandbox.pod],
    ])
}

fn capability_args(sandbox: &Sandbox) -> Value {
    json!({
        "cgroupPath": format!("/kubepods/besteffort/pod{}", sandbox.uid),
        "dns": {"Servers": null, "Searches": null, "Options": null},
        "io.kubernetes.cri.pod-annotations": {
            "kubernetes.io/config.seen": "2026-11-24T08:22:44.926051818Z",
            "kubernetes.io/config.source": "api",
        },
    })
}
