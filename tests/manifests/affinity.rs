//! Tests which nodes get an agent, by the labels that the API server stored.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use serde_json::{Value, json};

use crate::chart::template;
use crate::kustomize::build;
use crate::{find, known, server};

type Labels = BTreeMap<String, String>;

/// Evaluates node affinity like the scheduler: terms are ORed, expressions are ANDed, and NotIn matches a missing
/// label.
fn admits(spec: &Value, labels: &Labels) -> Result<bool> {
    let selector = spec["nodeSelector"].as_object().context("a node selector")?;
    let selected = selector.iter().all(|(key, value)| labels.get(key).map(String::as_str) == value.as_str());
    let required = &spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
    let mut admitted = false;
    for term in required["nodeSelectorTerms"].as_array().context("terms")? {
        let mut holds = true;
        for expression in term["matchExpressions"].as_array().context("expressions")? {
            let label = labels.get(expression["key"].as_str().context("a key")?);
            let values = expression["values"].as_array().context("values")?;
            let listed = label.is_some_and(|label| values.iter().any(|value| value == label));
            holds &= match expression["operator"].as_str() {
                Some("In") => listed,
                Some("NotIn") => !listed,
                other => bail!("operator {other:?} is not evaluated here"),
            };
        }
        admitted |= holds;
    }
    Ok(selected && admitted)
}

async fn stored(name: &str, os: &str, arch: &str, compute: Option<&str>) -> Result<Labels> {
    let server = server().await?;
    let mut labels = json!({"kubernetes.io/os": os, "kubernetes.io/arch": arch});
    if let Some(compute) = compute {
        labels["eks.amazonaws.com/compute-type"] = compute.into();
    }
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}});
    server.apply(&known(&[node])).await?;
    let node = Api::<Node>::all(server.client().await?).get(name).await?;
    node.metadata.labels.context("labels")
}

#[tokio::test]
async fn nodes_get_an_agent_by_their_labels() -> Result<()> {
    let pod = |objects: &[Value]| anyhow::Ok(find(objects, "DaemonSet")?["spec"]["template"]["spec"].clone());
    let agents = [
        ("base", pod(&build("base")?)?),
        ("chart", pod(&template("")?)?),
        ("with auto", pod(&template("excludedComputeTypes={fargate,hybrid}")?)?),
        ("with all", pod(&template("excludedComputeTypes=null")?)?),
        ("uninstall", pod(&build("uninstall")?)?),
    ];
    for (name, os, arch, compute, expected) in [
        ("plain", "linux", "amd64", None, [true; 5]),
        ("graviton", "linux", "arm64", None, [true; 5]),
        ("ec2", "linux", "amd64", Some("ec2"), [true; 5]),
        ("fargate", "linux", "amd64", Some("fargate"), [false, false, false, true, false]),
        ("hybrid", "linux", "amd64", Some("hybrid"), [false, false, false, true, true]),
        ("auto", "linux", "arm64", Some("auto"), [false, false, true, true, true]),
        ("windows", "windows", "amd64", None, [false; 5]),
        ("ppc", "linux", "ppc64le", None, [false; 5]),
    ] {
        let labels = stored(&format!("affinity-{name}"), os, arch, compute).await?;
        for ((manifest, spec), expected) in agents.iter().zip(expected) {
            ensure!(admits(spec, &labels)? == expected, "{manifest} on {labels:?}");
        }
    }
    Ok(())
}
