//! What the manifests grant, applied to the API server as kustomize would: constrained impersonation for the agent of
//! namespace `kirsa`, and beside it, so that one API server can hold both, direct minting for that of another.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow};
use lab::apiserver::ApiServer;
use serde_json::Value;

use crate::site::blocking;
use crate::thief::Thief;

/// Which rights an agent has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Impersonate,
    Direct,
    Either,
    /// Both at first, for a test that takes one away.
    Changing,
    /// Constrained impersonation, and container credentials.
    Container,
    /// Those of the base alone: none to mint.
    Neither,
}

impl Way {
    pub(crate) const BOTH: [Self; 2] = [Self::Impersonate, Self::Direct];

    /// Where the agent with these rights lives.
    pub(crate) fn namespace(self) -> &'static str {
        match self {
            Self::Impersonate => "kirsa",
            Self::Direct => "kirsa-direct",
            Self::Either => "kirsa-either",
            Self::Changing => "kirsa-changing",
            Self::Container => "kirsa-container",
            Self::Neither => "kirsa-neither",
        }
    }

    /// What is added to the base.
    fn components(self) -> &'static [&'static str] {
        match self {
            Self::Impersonate => &["components/constrained-impersonation"],
            Self::Direct => &["components/direct-minting"],
            Self::Either | Self::Changing => &["components/constrained-impersonation", "components/direct-minting"],
            Self::Container => &["components/constrained-impersonation", "components/container-credentials"],
            Self::Neither => &[],
        }
    }

    fn manifests(self) -> Result<Vec<String>> {
        let mut manifests = vec!["base/rbac.yaml".to_owned()];
        for component in self.components() {
            let kustomization: Value = serde_saphyr::from_str(&read(&format!("{component}/kustomization.yaml"))?)?;
            let resources = kustomization["resources"].as_array().context("resources")?;
            manifests.extend(resources.iter().filter_map(Value::as_str).map(|file| format!("{component}/{file}")));
        }
        Ok(manifests)
    }

    /// Whether an admission policy is part of it.
    pub(crate) fn is_fenced(self) -> Result<bool> {
        let manifests = self.manifests()?.iter().map(|path| read(path)).collect::<Result<Vec<_>>>()?;
        Ok(manifests.iter().any(|manifest| manifest.contains("kind: ValidatingAdmissionPolicyBinding")))
    }
}

/// Applies them all, once for the program; returns when the API server goes by them.
pub(crate) fn granted() -> Result<&'static ApiServer> {
    static GRANTED: OnceLock<Result<()>> = OnceLock::new();
    let server = ApiServer::get()?;
    GRANTED.get_or_init(|| grant(server)).as_ref().map_err(|error| anyhow!("the manifests: {error:#}"))?;
    Ok(server)
}

fn grant(server: &ApiServer) -> Result<()> {
    for way in [Way::Impersonate, Way::Direct, Way::Either, Way::Changing, Way::Container, Way::Neither] {
        for path in way.manifests()? {
            let manifest = in_namespace(&read(&path)?, way.namespace())?;
            blocking(server.apply(&manifest)).context(path)?;
        }
        Thief::wait_until_granted(server, way)?;
    }
    Ok(())
}

fn read(path: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset").join(path);
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// As `namespace: other` in a kustomization does it; and since cluster-wide objects of one name would replace each
/// other, they get the namespace as a suffix.
fn in_namespace(manifest: &str, namespace: &str) -> Result<String> {
    let mut objects: Vec<Value> = serde_saphyr::from_multiple(manifest)?;
    if namespace != Way::Impersonate.namespace() {
        for object in &mut objects {
            for name in ["/metadata/name", "/roleRef/name", "/spec/policyName"] {
                if let Some(Value::String(name)) = object.pointer_mut(name) {
                    name.push_str(&format!(".{namespace}"));
                }
            }
            for subject in object.get_mut("subjects").and_then(Value::as_array_mut).into_iter().flatten() {
                if subject["kind"] == "ServiceAccount" {
                    subject["namespace"] = namespace.into();
                }
            }
        }
    }
    // JSON is YAML.
    Ok(objects.iter().map(Value::to_string).collect::<Vec<_>>().join("\n---\n"))
}
