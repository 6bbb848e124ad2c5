//! A release in a real registry: published, pulled back, and installed from there with helm and with kubectl.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{Scale, smoke::own_credentials};
use crate::cluster::Cluster;

const OVERLAY: &str = "tests/cluster/overlay";
/// The registry that `tests/cluster/registry.sh` starts, and a path in it.
const REGISTRY: &str = "10.250.0.254:5000/e2e";
/// Without it the scripts ask git for the commit's date.
const EPOCH: (&str, &str) = ("SOURCE_DATE_EPOCH", "1700000000");
const STS: &str = "http://10.250.0.254:8080";
/// The only setting of `install.yaml` that is no comment in `config.env`.
const INTERCEPT: &str = "  KIRSA_INTERCEPT: nft\n";

pub fn run(cluster: &Cluster, _: &Scale) -> anyhow::Result<String> {
    cluster.agent_ready()?;
    let release = Release::publish(cluster)?;
    release.is_what_was_built()?;
    release.cannot_be_replaced()?;

    let on_node = || cluster.on("node1", &["ctr", "-n", "k8s.io", "images", "ls", "-q"]);
    ensure!(!on_node()?.contains(&release.image), "the node has {} before it pulls it", release.image);
    cluster.kubectl(&["delete", "-k", &cluster.manifests(OVERLAY)])?;
    let outcome = release.install_by_helm().and_then(|()| release.install_by_kubectl());
    // Whichever of them is there still.
    release.helm(&["uninstall", "kirsa", "--ignore-not-found"])?;
    cluster.kubectl(&["delete", "--ignore-not-found", "-f", &release.file("install.yaml")])?;
    cluster.on("node1", &["ctr", "-n", "k8s.io", "images", "rm", &release.image]).ok();
    cluster.kubectl(&["apply", "-k", &cluster.manifests(OVERLAY)])?;
    cluster.agent_ready()?;
    outcome?;
    cluster.clear()?;
    Ok(format!("{} was pulled back, and installed from there with helm and with kubectl", release.image))
}

struct Release<'a> {
    cluster: &'a Cluster,
    dist: PathBuf,
    /// `REGISTRY/kirsa@sha256:…`
    image: String,
    version: String,
}

impl<'a> Release<'a> {
    /// The binary that the cluster runs, built into an image twice and published as a release would be.
    fn publish(cluster: &'a Cluster) -> anyhow::Result<Self> {
        cluster.script("registry.sh", &[])?;
        let dist = cluster.state.join("dist");
        let mut release = Self { cluster, dist, image: String::new(), version: String::new() };
        let kirsa = binary(cluster)?;
        let again = build(cluster, &kirsa, &cluster.state.join("in/another/directory"))?;
        let built = build(cluster, &kirsa, &release.dist)?;
        ensure!(built == again, "the same files became two images, {built} and {again}");
        let printed = release.publish_again()?;
        let image = printed.lines().next().and_then(|line| line.strip_prefix(&format!("{REGISTRY}/kirsa:")));
        let (version, digest) = image.and_then(|image| image.split_once('@')).context(printed.clone())?;
        ensure!(digest == built, "{digest} was published, and {built} was built");
        release.image = format!("{REGISTRY}/kirsa@{digest}");
        release.version = version.to_owned();
        Ok(release)
    }

    fn publish_again(&self) -> anyhow::Result<String> {
        let dist = self.dist.display().to_string();
        let variables = [("REGISTRY", REGISTRY), ("PLAIN_HTTP", "1"), ("DIST", &dist), EPOCH];
        run_with(&self.cluster.manifests("release/publish.sh"), &[], &variables)
    }

    fn file(&self, name: &str) -> String {
        self.dist.join(name).display().to_string()
    }

    /// By digest, byte for byte; the checksums are those of the files; and the bill of materials names both kinds of parts.
    fn is_what_was_built(&self) -> anyhow::Result<()> {
        let pulled = self.file("pulled");
        let from = format!("docker://{}", self.image);
        run_command("skopeo", &["copy", "-q", "--all", "--src-tls-verify=false", &from, &format!("oci:{pulled}")])?;
        let (built, pulled) = (blobs(&self.dist.join("image"))?, blobs(Path::new(&pulled))?);
        ensure!(pulled.len() >= 4, "an index, a manifest, a configuration and a layer: {:?}", pulled.keys());
        for (name, contents) in &pulled {
            ensure!(built.get(name) == Some(contents), "{name} is not what was built");
        }
        let check = format!("cd {} && sha256sum --quiet --check SHA256SUMS", self.dist.display());
        run_command("sh", &["-c", &check])?;
        let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let bill: Value = serde_json::from_slice(&fs::read(self.file(&format!("kirsa-linux-{arch}.cdx.json")))?)?;
        for part in ["pkg:cargo/hyper@", "pkg:cargo/aws-lc-sys@", "pkg:deb/debian/libc6@", "pkg:deb/debian/nftables@"] {
            let names = |component: &Value| component["purl"].as_str().is_some_and(|purl| purl.starts_with(part));
            let named = bill["components"].as_array().is_some_and(|components| components.iter().any(names));
            ensure!(named, "the bill of materials lacks {part}");
        }
        Ok(())
    }

    /// The same again is no error; other contents under the same version are.
    fn cannot_be_replaced(&self) -> anyhow::Result<()> {
        self.publish_again()?;
        let path = self.dist.join("image/index.json");
        let before = fs::read_to_string(&path)?;
        let mut index: Value = serde_json::from_str(&before)?;
        let digest = index["manifests"][0]["digest"].as_str().context("a digest")?.replace("sha256:", "");
        let images: Value = serde_json::from_slice(&fs::read(self.dist.join("image/blobs/sha256").join(digest))?)?;
        // The image itself instead of the index.
        for member in ["digest", "size", "mediaType"] {
            index["manifests"][0][member] = images["manifests"][0][member].clone();
        }
        fs::write(&path, index.to_string())?;
        let refused = self.publish_again();
        fs::write(&path, before)?;
        let error = refused.err().context("another image was published under the same version")?;
        ensure!(format!("{error:#}").contains("is published already"), "{error:#}");
        Ok(())
    }

    fn install_by_helm(&self) -> anyhow::Result<()> {
        let chart = format!("oci://{REGISTRY}/charts/kirsa");
        let sts = format!("agent.stsEndpointUrl={STS}");
        let pulled = ["install", "kirsa", &chart, "--plain-http", "--version", &self.version];
        let options = ["--create-namespace", "--take-ownership", "--set", &sts];
        self.helm(&[&pulled[..], &options[..]].concat())?;
        self.serves("by-helm")?;
        self.helm(&["uninstall", "kirsa"]).map(drop)
    }

    fn install_by_kubectl(&self) -> anyhow::Result<()> {
        let file = self.file("install.yaml");
        let text = fs::read_to_string(&file)?;
        ensure!(text.contains(INTERCEPT), "{file} has no {INTERCEPT}");
        fs::write(&file, text.replace(INTERCEPT, &format!("{INTERCEPT}  KIRSA_STS_ENDPOINT_URL: {STS}\n")))?;
        self.cluster.kubectl(&["apply", "-f", &file])?;
        self.serves("by-kubectl")
    }

    /// The agent is the published image, and a pod gets its credentials from it.
    fn serves(&self, name: &str) -> anyhow::Result<()> {
        self.cluster.agent_ready()?;
        let pod = self.cluster.agent_pod("node1")?;
        let runs = &pod["spec"]["containers"][0]["image"];
        ensure!(*runs == self.image.as_str(), "{runs} runs, and {} is published", self.image);
        own_credentials(self.cluster, name)
    }

    fn helm(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let kubeconfig = self.cluster.state.join("admin.kubeconfig").display().to_string();
        let place = ["--kubeconfig", &kubeconfig, "--namespace", "kirsa"];
        run_command(&self.cluster.manifests("target/cluster/bin/helm"), &[arguments, &place[..]].concat())
    }
}

/// The agent's binary, out of the image's only layer.
fn binary(cluster: &Cluster) -> anyhow::Result<String> {
    let folder = cluster.state.join("archive");
    fs::create_dir_all(&folder)?;
    let into = folder.display().to_string();
    // An OCI archive is a layout in a tar file.
    run_command("tar", &["-xf", &cluster.state.join("kirsa.tar").display().to_string(), "-C", &into])?;
    let blob = |descriptor: &Value| {
        let digest = descriptor["digest"].as_str().and_then(|digest| digest.strip_prefix("sha256:"));
        anyhow::Ok(folder.join("blobs/sha256").join(digest.context("a digest")?))
    };
    let index: Value = serde_json::from_slice(&fs::read(folder.join("index.json"))?)?;
    let manifest: Value = serde_json::from_slice(&fs::read(blob(&index["manifests"][0])?)?)?;
    let layer = blob(&manifest["layers"][0])?.display().to_string();
    run_command("tar", &["-xf", &layer, "-C", &into, "usr/bin/kirsa"])?;
    Ok(folder.join("usr/bin/kirsa").display().to_string())
}

/// The digest of the image index.
fn build(cluster: &Cluster, kirsa: &str, dist: &Path) -> anyhow::Result<String> {
    let dist = dist.display().to_string();
    // Like the image of the cluster: with other packages where the mirror has lost the pinned ones.
    let variables = [("KIRSA_BINARY", kirsa), ("DIST", &dist), ("STRICT", "0"), ("REVISION", "e2e"), EPOCH];
    Ok(run_with(&cluster.manifests("release/build.sh"), &[], &variables)?.trim().to_owned())
}

/// The contents of a layout by their names.
fn blobs(layout: &Path) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let entries = fs::read_dir(layout.join("blobs/sha256"))?;
    let read = |entry: fs::DirEntry| anyhow::Ok((entry.file_name().display().to_string(), fs::read(entry.path())?));
    entries.map(|entry| read(entry?)).collect()
}

fn run_command(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    run_with(program, arguments, &[])
}

fn run_with(program: &str, arguments: &[&str], variables: &[(&str, &str)]) -> anyhow::Result<String> {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "240", program]).args(arguments).envs(variables.iter().copied());
    let output = command.output().with_context(|| program.to_owned())?;
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{program} {}: {}: {error}{out}", arguments.join(" "), output.status);
    Ok(out.into_owned())
}
