//! Applies the manifests' RBAC rules to the API server as kustomize would. The agents with different rights are in
//! different namespaces, so that one API server has all of them: for example, constrained impersonation in `kirsa`.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow};
use lab::apiserver::ApiServer;
use serde_json::Value;

use crate::raw_client::RawClient;
use crate::site::blocking;

/// The rights of an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AgentRights {
    Impersonation,
    Direct,
    BothModes,
    /// Both, for a test that revokes one of them.
    Revocable,
    /// Constrained impersonation, and container credentials.
    ContainerCredentials,
    /// Only the rights of the base, which cannot mint tokens.
    NoMinting,
}

impl AgentRights {
    pub(crate) const EACH_MODE: [Self; 2] = [Self::Impersonation, Self::Direct];

    /// Returns the namespace of the agent with these rights.
    pub(crate) fn namespace(self) -> &'static str {
        match self {
            Self::Impersonation => "kirsa",
            Self::Direct => "kirsa-direct",
            Self::BothModes => "kirsa-both-modes",
            Self::Revocable => "kirsa-revocable",
            Self::ContainerCredentials => "kirsa-container",
            Self::NoMinting => "kirsa-no-minting",
        }
    }

    /// Returns the kustomize components that are added to the base.
    fn components(self) -> &'static [&'static str] {
        match self {
            Self::Impersonation => &["components/constrained-impersonation"],
            Self::Direct => &["components/direct-minting"],
            Self::BothModes | Self::Revocable => &["components/constrained-impersonation", "components/direct-minting"],
            Self::ContainerCredentials => &["components/constrained-impersonation", "components/container-credentials"],
            Self::NoMinting => &[],
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

    /// Returns whether the manifests contain an admission policy.
    pub(crate) fn has_admission_policy(self) -> Result<bool> {
        let manifests = self.manifests()?.iter().map(|path| read(path)).collect::<Result<Vec<_>>>()?;
        Ok(manifests.iter().any(|manifest| manifest.contains("kind: ValidatingAdmissionPolicyBinding")))
    }
}

/// Returns the API server, after applying all manifests once and waiting until they take effect.
pub(crate) fn api_server() -> Result<&'static ApiServer> {
    static APPLIED: OnceLock<Result<()>> = OnceLock::new();
    let server = ApiServer::get()?;
    APPLIED.get_or_init(|| apply_manifests(server)).as_ref().map_err(|error| anyhow!("the manifests: {error:#}"))?;
    Ok(server)
}

fn apply_manifests(server: &ApiServer) -> Result<()> {
    for rights in [
        AgentRights::Impersonation,
        AgentRights::Direct,
        AgentRights::BothModes,
        AgentRights::Revocable,
        AgentRights::ContainerCredentials,
        AgentRights::NoMinting,
    ] {
        for path in rights.manifests()? {
            let manifest = move_to_namespace(&read(&path)?, rights.namespace())?;
            blocking(server.apply(&manifest)).context(path)?;
        }
        RawClient::wait_for_rights(server, rights)?;
    }
    Ok(())
}

fn read(path: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset").join(path);
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// Moves a manifest to a namespace like `namespace:` in a kustomization. Cluster-wide objects get the namespace as a
/// suffix, since objects of the same name would replace each other.
fn move_to_namespace(manifest: &str, namespace: &str) -> Result<String> {
    let mut objects: Vec<Value> = serde_saphyr::from_multiple(manifest)?;
    if namespace != AgentRights::Impersonation.namespace() {
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
