//! Tests that the Helm chart renders the same objects as kustomize does from the base and its components.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value};

use crate::base::variables_of_the_agent;
use crate::{find, folder, known, kustomize, objects, output_of, run, server, text};

/// Chart values, each with the equivalent components.
const SWITCHES: [(&str, &[&str]); 8] = [
    ("", &["constrained-impersonation"]),
    ("minting=direct", &["direct-minting"]),
    ("startupTaint=true", &["constrained-impersonation", "startup-taint"]),
    ("containerCredentials=true", &["constrained-impersonation", "container-credentials"]),
    ("metrics.enabled=true", &["constrained-impersonation", "metrics"]),
    ("intercept=iptables", &["constrained-impersonation", "iptables"]),
    ("intercept=cilium", &["constrained-impersonation", "cilium"]),
    (
        "minting=direct,startupTaint=true,containerCredentials=true,metrics.enabled=true,intercept=iptables",
        &["direct-minting", "startup-taint", "container-credentials", "metrics", "iptables"],
    ),
];

/// Variables of the agent without a chart value: set by the manifests, set by switches, or unused in a cluster.
const NO_VALUES: [&str; 10] = [
    "NODE_NAME",
    "HOST_IP",
    "AWS_REGION",
    "KIRSA_ADMIN_SOCKET",
    "KIRSA_INTERCEPT",
    "KIRSA_MINTING",
    "KIRSA_STARTUP_TAINT",
    "KIRSA_CONTAINER_CREDENTIALS",
    "KIRSA_WORKLOADS",
    "KUBECONFIG",
];

pub(crate) fn path() -> String {
    folder("chart").display().to_string()
}

pub(crate) fn template(values: &str) -> Result<Vec<Value>> {
    let output = output_of("helm", &["template", "kirsa", &path(), "--namespace=kirsa", "--set", values])?;
    objects(&output).with_context(|| values.to_owned())
}

/// Indexes the objects by kind and name. kustomize adds a hash to a ConfigMap's name; the chart has a checksum
/// annotation instead.
fn index(objects: Vec<Value>) -> BTreeMap<String, Value> {
    let unhashed = |name: &mut Value| {
        if name.as_str().is_some_and(|name| name.starts_with("kirsa-")) {
            *name = "kirsa".into();
        }
    };
    let mut index = BTreeMap::new();
    for mut object in objects {
        match object["kind"].as_str() {
            Some("ConfigMap") => unhashed(&mut object["metadata"]["name"]),
            Some("DaemonSet") => {
                unhashed(&mut object["spec"]["template"]["spec"]["containers"][0]["envFrom"][0]["configMapRef"]["name"])
            }
            _ => {}
        }
        let key = format!("{} {}", object["kind"], object["metadata"]["name"]);
        assert!(index.insert(key.clone(), object).is_none(), "{key} twice");
    }
    index
}

fn remove(object: &mut Value, member: &str) -> Map<String, Value> {
    let removed = object.as_object_mut().and_then(|object| object.remove(member));
    removed.and_then(|removed| removed.as_object().cloned()).unwrap_or_default()
}

/// Removes what only the chart adds: labels, the checksum, and the annotation that keeps the namespace.
fn remove_helm_additions(key: &str, kustomized: &mut Value, templated: &mut Value) -> Result<()> {
    let added = ["name", "part-of", "managed-by"].map(|label| format!("app.kubernetes.io/{label}"));
    let expected = remove(&mut kustomized["metadata"], "labels");
    let mut labels = remove(&mut templated["metadata"], "labels");
    for (label, value) in &expected {
        ensure!(labels.remove(label).as_ref() == Some(value), "{key} lacks {label}={value}");
    }
    labels.retain(|label, _| label != "helm.sh/chart" && !added.contains(label));
    ensure!(labels.is_empty(), "{key}: {labels:?}");
    if templated["kind"] == "Namespace" {
        let annotations = remove(&mut templated["metadata"], "annotations");
        ensure!(Value::from(annotations) == serde_json::json!({"helm.sh/resource-policy": "keep"}));
    }
    if templated["kind"] == "DaemonSet" {
        let annotations = templated["spec"]["template"]["metadata"]["annotations"].as_object_mut();
        annotations.and_then(|annotations| annotations.remove("kirsa.dev/config")).context("the checksum")?;
    }
    Ok(())
}

#[test]
fn each_switch_equals_its_component() -> Result<()> {
    for (values, components) in SWITCHES {
        let mut kustomized = index(kustomize::with(components)?);
        let mut templated = index(template(values)?);
        let names = |objects: &BTreeMap<String, Value>| objects.keys().cloned().collect::<BTreeSet<_>>();
        assert_eq!(names(&kustomized), names(&templated), "{values}");
        for (key, kustomized) in &mut kustomized {
            let templated = templated.get_mut(key).context("the same names")?;
            remove_helm_additions(key, kustomized, templated)?;
            assert_eq!(kustomized, templated, "{values}: {key}");
        }
    }
    Ok(())
}

#[test]
fn chart_defaults_equal_the_kustomize_root() -> Result<()> {
    assert_eq!(index(kustomize::build("")?), index(kustomize::with(SWITCHES[0].1)?));
    let used: BTreeSet<&str> = SWITCHES.iter().flat_map(|(_, components)| components.iter().copied()).collect();
    let all = kustomize::components()?;
    assert_eq!(used, all.iter().map(String::as_str).collect(), "a component without a switch");
    let chart: Value = serde_saphyr::from_str(&text(&folder("chart/Chart.yaml"))?)?;
    assert_eq!((&chart["version"], &chart["appVersion"]), (&env!("CARGO_PKG_VERSION").into(), &chart["version"]));
    Ok(())
}

/// Packaging resolves the symbolic links in files/, so an archive does not need the repository.
#[test]
fn chart_archive_is_complete() -> Result<()> {
    output_of("helm", &["package", &path(), "--destination", lab::namespace::STATE])?;
    let archive = format!("{}/kirsa-{}.tgz", lab::namespace::STATE, env!("CARGO_PKG_VERSION"));
    let values = SWITCHES[SWITCHES.len() - 1].0;
    let unpacked =
        objects(&output_of("helm", &["template", "kirsa", &archive, "--namespace=kirsa", "--set", values])?)?;
    assert_eq!(index(unpacked), index(template(values)?));
    Ok(())
}

#[test]
fn lint_finds_nothing() -> Result<()> {
    for values in ["metrics.enabled=true", "intercept=cilium,minting=direct,startupTaint=true"] {
        output_of("helm", &["lint", "--strict", "--quiet", &path(), "--set", values])?;
    }
    Ok(())
}

#[tokio::test]
async fn api_server_accepts_every_switch_and_value() -> Result<()> {
    let server = server().await?;
    let more = [
        "intercept=none",
        "audiences={sts.amazonaws.com,minio},agent.audience=minio,agent.stsEndpointUrl=http://minio:9000",
        "minting=direct,audiences={sts.amazonaws.com,minio},agent.region=eu-central-1",
        "agent.cniResults=none,agent.stateDir=/opt/kirsa,agent.adminAddress=10.0.0.1:9000,agent.drain=30",
        "image.repository=registry:5000/kirsa,image.pullSecrets[0].name=registry,resources.limits.memory=1Gi",
        "nodeSelector.a=b,priorityClassName=high,updateStrategy.type=OnDelete,podAnnotations.a=b",
        "tolerations[0].key=a,tolerations[0].operator=Exists,dnsPolicy=ClusterFirstWithHostNet",
    ];
    for values in SWITCHES.iter().map(|(values, _)| *values).chain(more) {
        server.apply_dry_run(&known(&template(values)?)).await.with_context(|| values.to_owned())?;
    }
    Ok(())
}

#[test]
fn every_flag_is_a_value_that_reaches_the_agent() -> Result<()> {
    let values: Value = serde_saphyr::from_str(&text(&folder("chart/values.yaml"))?)?;
    let flags = values["agent"].as_object().context("agent")?;
    let set: Vec<String> = flags.keys().map(|flag| format!("agent.{flag}={}", sample(flag))).collect();
    let templated = template(&set.join(","))?;
    let data = find(&templated, "ConfigMap")?["data"].as_object().context("its data")?;
    let pod = &find(&templated, "DaemonSet")?["spec"]["template"]["spec"];

    let mut reached: BTreeSet<String> = data.keys().cloned().collect();
    reached.extend(NO_VALUES.map(str::to_owned));
    assert_eq!(reached, variables_of_the_agent()?);
    assert_eq!(data["KIRSA_MAX_CONNECTIONS"], "2000000");
    assert_eq!(pod["terminationGracePeriodSeconds"], 2_000_005);
    let mounts: Vec<&Value> =
        pod["containers"][0]["volumeMounts"].as_array().context("mounts")?.iter().map(|at| &at["mountPath"]).collect();
    let token = "/var/run/secrets/kubernetes.io/serviceaccount";
    assert_eq!(mounts, ["/opt/state", "/opt", "/run/kirsa", token], "the agent's directories are mounted");
    Ok(())
}

/// Returns a valid value other than the default.
fn sample(flag: &str) -> &'static str {
    match flag {
        "region" => "eu-central-1",
        "stsEndpointUrl" => "https://sts.example",
        "audience" => "sts.amazonaws.com",
        "annotationPrefix" => "example.com",
        "sessionDuration" | "port" => "7200",
        "startWindow" => "300",
        "sessionScope" => "pod",
        "requireImdsv2" => "true",
        "requireImdsv2Namespaces" => "shop",
        "containerAudience" => "pods.eks.amazonaws.com",
        "cniResults" => "/opt/results",
        "stateDir" => "/opt/state",
        "nodeMetadata" => "none",
        "nodeMetadataValue" => "meta-data/mac=00",
        "adminAddress" => "0.0.0.0:9000",
        "logFormat" => "text",
        "logLevel" => "debug",
        _ => "2000000",
    }
}

#[test]
fn custom_node_selector_keeps_linux() -> Result<()> {
    let templated = template("nodeSelector.pool=apps")?;
    let chosen = &find(&templated, "DaemonSet")?["spec"]["template"]["spec"]["nodeSelector"];
    assert_eq!(*chosen, serde_json::json!({"kubernetes.io/os": "linux", "pool": "apps"}));
    Ok(())
}

#[test]
fn invalid_values_are_rejected_by_name() -> Result<()> {
    for (values, named) in [
        ("intercept=ebpf", "'/intercept'"),
        ("minting=auto", "'/minting'"),
        ("metrics.enabled=yes", "'/metrics/enabled'"),
        ("agent.sessionDuration=900", "'/agent/sessionDuration'"),
        ("agent.sesionDuration=3600", "'sesionDuration'"),
        ("agent.region=EU", "'/agent/region'"),
        ("agent.adminAddress=8182", "'/agent/adminAddress'"),
        ("image.tga=1", "'tga'"),
        ("resources.limit.memory=1Mi", "'limit'"),
        ("updateStrategy.type=Recreate", "'/updateStrategy/type'"),
        ("audiences={}", "'/audiences/0'"),
        ("nodeselector.a=b", "'nodeselector'"),
        ("excludedComputeTypes=auto", "'/excludedComputeTypes'"),
        ("agent.audience=minio", "agent.audience must be one of audiences"),
    ] {
        let output = run("helm", &["template", &path(), "--set", values])?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && stderr.contains(named), "{values}: {stderr}");
    }
    for (version, values, named) in [
        ("1.35.0", "", "set minting=direct"),
        ("1.34.2", "minting=direct", "agent.region must be set"),
        ("1.29.0", "minting=direct,agent.region=eu-central-1", "incompatible with Kubernetes"),
    ] {
        let output = run("helm", &["template", &path(), "--kube-version", version, "--set", values])?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && stderr.contains(named), "{version} {values}: {stderr}");
    }
    Ok(())
}
