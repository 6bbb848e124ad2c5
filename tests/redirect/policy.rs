//! Pods that the AWS VPC CNI routes by interface, or gives egress addresses unknown to the API server, are refused with
//! the cause.

use anyhow::{Context, Result, ensure};
use lab::agent::field;
use lab::http::CREDENTIALS_PATH;
use lab::net::{METADATA, Pod, Shape};

use super::site::Site;

fn pod(site: &Site) -> Result<&Pod> {
    site.pods.iter().find(|pod| pod.shape() == Shape::RoutedBare).context("a pod on a bare veth")
}

/// Simulates security groups for pods in strict mode: the pod's packets pass its own VLAN and the network outside the
/// node, even between the pod and its node.
fn route_by_interface(site: &Site, pod: &Pod) -> Result<()> {
    let (node, vpc) = (site.node.netns(), site.node.vpc());
    node.ip([format!("link add vlan.eth.1 type veth peer name trunk netns {}", vpc.name())])?;
    vpc.ip([
        "addr add 10.253.0.1/24 dev trunk".into(),
        "link set trunk up".into(),
        format!("route add {} via 10.253.0.2", pod.ip()),
    ])?;
    node.ip([
        "addr add 10.253.0.2/24 dev vlan.eth.1".into(),
        "link set vlan.eth.1 up".into(),
        "route add default via 10.253.0.1 dev vlan.eth.1 table 101".into(),
        format!("route add {} dev {} table 101", pod.ip(), pod.host_interface()),
        // Bypasses the bridge of the other pods.
        format!("route replace {} via 10.250.{}.1 dev eth0", pod.ip(), site.node.host_ip().octets()[2]),
        "rule add pref 10 iif vlan.eth.1 lookup 101".into(),
        format!("rule add pref 10 iif {} lookup 101", pod.host_interface()),
        // The plugin moves the local table behind its own rules.
        "rule add pref 20 lookup local".into(),
        "rule del pref 0".into(),
    ])?;
    for name in ["all", "eth0", "vlan.eth.1"] {
        node.sysctl(&format!("ipv4/conf/{name}/rp_filter"), "0")?;
    }
    Ok(())
}

#[test]
fn refusal_names_the_interface_route() -> Result<()> {
    let site = Site::new("nft")?;
    let agent = site.start()?;
    let pod = pod(&site)?;
    ensure!(pod.imds().role_list()?.status == 200);
    route_by_interface(&site, pod)?;
    let answer = pod.imds().get(CREDENTIALS_PATH).send()?;
    ensure!(answer.status == 403, "{answer:?}");
    let refused = agent.wait_for_refusal("not_redirected")?;
    let detail = field(&refused, "detail").unwrap_or_default();
    ensure!(detail.contains("iif vlan.eth.1 lookup 101"), "{refused}");
    ensure!(refused.to_string().contains("POD_SECURITY_GROUP_ENFORCING_MODE=standard"), "{refused}");
    site.no_pod_got_outside()?;
    agent.stop()
}

#[test]
fn refusal_of_egress_address_names_the_fix() -> Result<()> {
    let site = Site::new("nft")?;
    let agent = site.start()?;
    let pod = pod(&site)?;
    pod.netns().ip(["addr add 169.254.172.2/32 dev eth0"])?;
    site.node.netns().ip([format!("route add 169.254.172.2 dev {}", pod.host_interface())])?;
    pod.netns().shell(&format!("ip route replace {METADATA} via 169.254.1.1 dev eth0 src 169.254.172.2"))?;
    let answer = pod.imds().get(CREDENTIALS_PATH).send()?;
    ensure!(answer.status == 503, "{answer:?}");
    let refused = agent.wait_for_refusal("unknown_pod")?;
    let detail = field(&refused, "detail").unwrap_or_default();
    ensure!(detail.contains("169.254.172.2") && detail.contains("ENDPOINT_MODE=IPv6"), "{refused}");
    agent.stop()
}
