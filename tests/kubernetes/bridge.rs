//! Pods that share a Linux bridge: a pod that can send arbitrary frames cannot get its neighbor's credentials.

mod frames;
mod guard;

use std::net::{IpAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::cni::Sandbox;
use lab::net::{METADATA, METADATA6, Pod, Shape};
use lab::netns::Netns;
use lab::poll::poll;

use crate::TIMEOUT;
use crate::site::{Site, role, wait_for_metric};

/// Two pods on one bridge, each with a role and a CNI record.
struct Bridge {
    site: Site,
    victim: Pod,
    attacker: Pod,
    sandbox: Sandbox,
}

impl Bridge {
    fn new(backend: &str) -> Result<Self> {
        let mut site = Site::new()?;
        site.options = site.options.flag("--intercept", backend);
        let join = |name: &str| {
            site.account(name)?;
            let uid = site.bind(name, name)?;
            let pod = site.node.pod(name, Shape::Bridge)?;
            let sandbox = site.sandbox(name, &uid);
            site.records()?.add(&sandbox, &pod)?;
            site.report_address(&pod)?;
            anyhow::Ok((pod, sandbox))
        };
        let ((victim, sandbox), (attacker, _)) = (join("victim")?, join("attacker")?);
        Ok(Self { site, victim, attacker, sandbox })
    }

    fn start(&self, state: &str) -> Result<Agent> {
        let agent = self.site.start()?;
        wait_for_metric(&agent, "kirsa_bridge_ports", &[("state", state)], 2.0)?;
        self.assert_all_served()?;
        Ok(agent)
    }

    fn assert_all_served(&self) -> Result<()> {
        for pod in [&self.victim, &self.attacker] {
            self.site.assert_served(pod, pod.name())?;
            if pod.ip6().is_some() {
                let answer = pod.imds6().role_list()?;
                ensure!(answer.status == 200 && answer.body == role(pod.name()), "{answer:?}");
            }
        }
        Ok(())
    }

    fn mac(&self) -> Result<String> {
        let link = self.site.node.netns().shell("ip -o link show cni0")?;
        let mac = link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
        mac.map(str::to_owned).context("the bridge's MAC address")
    }

    /// Runs `work` while the attacker's interface has the address too, so that its kernel uses it as its own.
    fn as_attacker<T>(&self, address: IpAddr, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let address = if address.is_ipv4() { format!("{address}/24") } else { format!("{address}/64 nodad") };
        self.attacker.netns().ip([format!("addr add {address} dev eth0"), "neigh flush dev eth0".into()])?;
        let done = work()?;
        self.attacker.netns().ip([format!("addr del {} dev eth0", address.trim_end_matches(" nodad"))])?;
        Ok(done)
    }

    /// Returns the response to a request that the attacker sends from the victim's address.
    fn request_as(&self, address: IpAddr) -> Result<String> {
        let service = if address.is_ipv4() { "169.254.169.254" } else { "[fd00:ec2::254]" };
        let path = "latest/meta-data/iam/security-credentials/";
        self.as_attacker(address, || {
            self.attacker.netns().shell(&format!("curl -gsm 2 --interface {address} http://{service}/{path} || true"))
        })
    }

    /// Returns which spoofed SYNs reach the node's IP layer from the victim's address.
    fn spoofed_syns(&self, address: IpAddr) -> Result<Vec<(&'static str, bool)>> {
        let mut arrived = Vec::new();
        for frame in frames::spoofed_syns(address, &self.attacker.mac(), &self.mac()?) {
            self.send(address, &frame.frames)?;
            arrived.push((frame.name, counted(self.site.node.netns(), "first")? > 0));
        }
        Ok(arrived)
    }

    /// Sends frames and then a SYN from the attacker's own address; returns when the node has received that SYN.
    fn send(&self, victim: IpAddr, frames: &[Vec<u8>]) -> Result<()> {
        let node = self.site.node.netns();
        let own =
            frames::spoofed_syns(self.attacker.ip().into(), &self.attacker.mac(), &self.mac()?).swap_remove(0).frames;
        count(node, "tcp dport 80", [victim, self.attacker.ip().into()])?;
        frames::send(&self.attacker, &[frames, &own].concat())?;
        poll("the attacker's own SYN", TIMEOUT, || counted(node, "second").is_ok_and(|count| count > 0).then_some(()))
    }

    /// Returns whether the victim receives a response that the attacker sends from the metadata service's address.
    fn respond_as_service(&self, service: IpAddr) -> Result<bool> {
        let (victim, own) = (self.victim.netns(), self.attacker.ip().into());
        count(victim, "tcp sport 80", [service, own])?;
        let frames = [service, own].map(|source| frames::response(source, &self.attacker.mac(), &self.victim));
        frames::send(&self.attacker, &frames)?;
        poll("the attacker's own segment", TIMEOUT, || {
            counted(victim, "second").is_ok_and(|count| count > 0).then_some(())
        })?;
        Ok(counted(victim, "first")? > 0)
    }

    /// Returns which ARP or neighbor-discovery messages redirect the node's packets for the victim to the attacker.
    fn claim_address(&self, address: IpAddr) -> Result<Vec<(&'static str, bool)>> {
        let (node, attacker) = (self.site.node.netns(), self.attacker.netns());
        let is_hijacked = || {
            let entry = node.shell(&format!("ip neigh show {address} dev cni0"))?;
            anyhow::Ok(entry.contains("lladdr") && !entry.contains(&self.victim.mac()))
        };
        let reset = || {
            let mac = self.victim.mac();
            node.shell(&format!("ip neigh replace {address} lladdr {mac} dev cni0 nud stale"))
        };
        let gateway: IpAddr = match address {
            IpAddr::V4(v4) => (v4.to_bits() & !0xff | 1).to_be_bytes().into(),
            IpAddr::V6(v6) => (v6.to_bits() >> 16 << 16 | 1).to_be_bytes().into(),
        };
        self.as_attacker(address, || {
            reset()?;
            // The request for the gateway's MAC address maps the victim's address to the attacker's MAC address.
            attacker.run(|| UdpSocket::bind((address, 0))?.send_to(b"?", (gateway, 9)))?;
            self.send(address, &[])?;
            let requesting = is_hijacked()?;
            reset()?;
            for (family, name) in [("ipv4", "arp_notify"), ("ipv6", "ndisc_notify")] {
                attacker.sysctl(&format!("{family}/conf/eth0/{name}"), "1")?;
            }
            // A new MAC address makes the kernel announce all its addresses.
            attacker.ip([format!("link set eth0 address 0a:00:00:00:ff:{:02x}", u8::from(address.is_ipv4()))])?;
            self.send(address, &[])?;
            let announcing = is_hijacked()?;
            attacker.ip([format!("link set eth0 address {}", self.attacker.mac())])?;
            reset()?;
            Ok(vec![("request for the gateway", requesting), ("announcement", announcing)])
        })
    }

    /// Returns which frames make the bridge forward the victim's MAC address to the attacker's port.
    fn steal_mac(&self) -> Result<Vec<(&'static str, bool)>> {
        let node = self.site.node.netns();
        let mac = self.victim.mac();
        let mut moved = Vec::new();
        let whole = frames::spoofed_syns(self.attacker.ip().into(), &mac, &self.mac()?).swap_remove(0).frames;
        for (name, frames) in [("request", whole), ("LLDP", vec![frames::reserved_multicast(&mac)])] {
            self.assert_all_served()?;
            self.send(self.victim.ip().into(), &frames)?;
            let port = node.shell(&format!("bridge fdb show br cni0 | grep {mac}"))?;
            moved.push((name, port.contains(&format!("dev {} ", self.attacker.host_interface()))));
        }
        Ok(moved)
    }

    /// Runs all attacks; returns which of them succeed.
    fn attacks(&self) -> Result<Vec<(String, bool)>> {
        let mut attacks = Vec::new();
        for address in self.victim.address().ips() {
            attacks.push((format!("{address}: request"), self.request_as(address)? == role("victim")));
            let service = if address.is_ipv4() { METADATA.into() } else { METADATA6.into() };
            attacks.push((format!("respond as {service}"), self.respond_as_service(service)?));
            let spoofed =
                self.spoofed_syns(address)?.into_iter().map(|(name, worked)| (format!("SYN, {name}"), worked));
            let claims = self.claim_address(address)?.into_iter().map(|(name, worked)| (name.to_owned(), worked));
            attacks.extend(spoofed.chain(claims).map(|(name, worked)| (format!("{address}: {name}"), worked)));
        }
        attacks.extend(self.steal_mac()?.into_iter().map(|(name, worked)| (format!("MAC address: {name}"), worked)));
        Ok(attacks)
    }

    fn table(&self) -> String {
        self.site.node.netns().shell("nft --stateless list table bridge kirsa").unwrap_or_default()
    }
}

/// Counts packets that reach a namespace from two addresses.
fn count(netns: &Netns, what: &str, sources: [IpAddr; 2]) -> Result<()> {
    let [first, second] =
        sources.map(|source| format!("{} saddr {source}", if source.is_ipv4() { "ip" } else { "ip6" }));
    netns.shell(&format!(
        "nft 'table inet count; delete table inet count; table inet count {{ counter first {{ }}; counter second {{ }}; \
         chain c {{ type filter hook prerouting priority -300; {first} {what} counter name first; \
         {second} {what} counter name second; }}; }}'"
    ))?;
    Ok(())
}

fn counted(netns: &Netns, which: &str) -> Result<u32> {
    let counter = netns.shell(&format!("nft list counter inet count {which}"))?;
    let packets = counter.split_whitespace().skip_while(|word| *word != "packets").nth(1);
    Ok(packets.context("packets")?.parse()?)
}

#[test]
fn bridge_neighbors_cannot_impersonate() -> Result<()> {
    let bridge = Bridge::new("nft")?;
    let agent = bridge.start("guarded")?;
    let attacks = bridge.attacks()?;
    ensure!(attacks.iter().all(|(_, worked)| !worked), "{attacks:#?}");
    bridge.assert_all_served()?;
    agent.stop()
}

/// The attacks of the test above work without the guard.
#[test]
fn unguarded_bridges_are_open_to_neighbors() -> Result<()> {
    let bridge = Bridge::new("iptables")?;
    let agent = bridge.start("open")?;
    let attacks = bridge.attacks()?;
    ensure!(attacks.iter().all(|(_, worked)| *worked), "{attacks:#?}");
    agent.wait_for_log(|entry| {
        entry["message"].as_str().is_some_and(|message| message.contains("share a Linux bridge"))
    })?;
    agent.stop()
}
