//! Pods with several addresses of one family, and with one family only, in every shape of pod network.

use anyhow::{Context, Result, ensure};
use lab::http::{CREDENTIALS_PATH, TOKEN};
use lab::net::{Address, Pod, Shape};

use super::site::{Site, account};

/// Adds an address to a pod, as a second pod network does, and the route to it.
fn add_address(site: &Site, pod: &Pod, address: Address) -> Result<()> {
    pod.netns().ip([format!("addr add {}/32 dev eth0", address.v4)])?;
    if let Some(v6) = address.v6 {
        pod.netns().ip([format!("addr add {v6}/128 dev eth0 nodad")])?;
    }
    if pod.shape() != Shape::Bridge {
        let device = pod.host_interface();
        site.node.netns().ip([format!("route add {} dev {device}", address.v4)])?;
        if let Some(v6) = address.v6 {
            site.node.netns().ip([format!("route add {v6} dev {device}")])?;
        }
    }
    Ok(())
}

/// Makes the pod connect from this source address.
fn use_source(pod: &Pod, address: Address) -> Result<()> {
    pod.netns().shell(&format!("ip route replace $(ip route show default) src {}", address.v4))?;
    if let Some(v6) = address.v6 {
        pod.netns().shell(&format!("ip -6 route replace $(ip -6 route show default | head -1) src {v6}"))?;
    }
    Ok(())
}

fn every_address_of_a_pod_is_attributed(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    let mut more = Vec::new();
    for pod in &site.pods {
        let (second, stray) = (site.node.allocate(), site.node.allocate());
        add_address(&site, pod, second)?;
        add_address(&site, pod, stray)?;
        let mut entry = site.with_role(pod)?;
        entry.addresses.extend(second.ips());
        site.put(entry)?;
        more.push((second, stray));
    }
    let agent = site.start()?;
    for (pod, (second, stray)) in site.pods.iter().zip(more) {
        let role = format!("{}-role", account(pod.shape()));
        let token = pod.imds().put_token(60)?;
        for from in [pod.address(), second] {
            use_source(pod, from)?;
            for mut imds in Site::clients(pod) {
                let what = format!("{:?} from {from:?}: {imds:?}", pod.shape());
                let list = imds.role_list().context(what.clone())?;
                ensure!(list.status == 200 && list.body == role, "{what}: {list:?}");
                ensure!(site.session(&imds.credentials(&role)?.body)?.role_arn == site.arn(pod.name()), "{what}");
                // An IMDS token belongs to the pod, not to the address.
                let answer = imds.get(CREDENTIALS_PATH).header(TOKEN, &token).send()?;
                ensure!(answer.status == 200, "{what}: {answer:?}");
            }
        }
        use_source(pod, stray)?;
        for mut imds in Site::clients(pod) {
            let list = imds.get(CREDENTIALS_PATH).send()?;
            ensure!(list.status == 503, "{:?}: an unlisted address: {list:?}", pod.shape());
        }
    }
    site.no_pod_got_outside()?;
    agent.stop()
}

/// On a dual-stack node, the API server lists single-stack pods with one family only.
fn unlisted_address_family_is_refused(backend: &'static str) -> Result<()> {
    let site = Site::new(backend)?;
    for v6 in [false, true] {
        for pod in site.pods.iter().filter(|pod| pod.ip6().is_some()) {
            let mut entry = site.with_role(pod)?;
            entry.addresses.retain(|address| address.is_ipv6() == v6);
            site.put(entry)?;
        }
        let agent = site.start()?;
        for pod in site.pods.iter().filter(|pod| pod.ip6().is_some()) {
            let (mut listed, mut other) = if v6 { (pod.imds6(), pod.imds()) } else { (pod.imds(), pod.imds6()) };
            let list = listed.role_list()?;
            ensure!(list.status == 200 && list.body == format!("{}-role", pod.name()), "{:?}: {list:?}", pod.shape());
            let list = other.get(CREDENTIALS_PATH).send()?;
            ensure!(list.status == 503, "{:?}: {list:?}", pod.shape());
        }
        agent.stop()?;
    }
    site.no_pod_got_outside()
}

with_nft_and_iptables! {
    every_address_of_a_pod_is_attributed,
    unlisted_address_family_is_refused,
}
