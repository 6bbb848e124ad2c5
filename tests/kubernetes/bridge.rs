//! Pods that share a Linux bridge: one that can send any frame gets none of its neighbor's credentials.

mod frames;
mod guard;

use std::net::{IpAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use lab::agent::Agent;
use lab::cni::Sandbox;
use lab::net::{METADATA, METADATA6, Pod, Shape};
use lab::netns::Netns;
use lab::poll::poll;

use crate::PATIENCE;
use crate::site::{Site, role, wait_for_metric};

/// Two pods on one bridge, each with a role and a record.
struct Bridge {
    site: Site,
    victim: Pod,
    thief: Pod,
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
            site.show(&pod)?;
            anyhow::Ok((pod, sandbox))
        };
        let ((victim, sandbox), (thief, _)) = (join("victim")?, join("thief")?);
        Ok(Self { site, victim, thief, sandbox })
    }

    fn start(&self, state: &str) -> Result<Agent> {
        let agent = self.site.start()?;
        wait_for_metric(&agent, "kirsa_bridge_ports", &[("state", state)], 2.0)?;
        self.all_are_served()?;
        Ok(agent)
    }

    fn all_are_served(&self) -> Result<()> {
        for pod in [&self.victim, &self.thief] {
            self.site.serves(pod, pod.name())?;
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

    /// The thief has the address too: its kernel claims it, finishes handshakes from it and talks as it.
    fn as_thief<T>(&self, address: IpAddr, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let address = if address.is_ipv4() { format!("{address}/24") } else { format!("{address}/64 nodad") };
        self.thief.netns().ip([format!("addr add {address} dev eth0"), "neigh flush dev eth0".into()])?;
        let done = work()?;
        self.thief.netns().ip([format!("addr del {} dev eth0", address.trim_end_matches(" nodad"))])?;
        Ok(done)
    }

    /// What the thief gets when it asks from the victim's address, with nothing in its way.
    fn asks_as(&self, address: IpAddr) -> Result<String> {
        let service = if address.is_ipv4() { "169.254.169.254" } else { "[fd00:ec2::254]" };
        let path = "latest/meta-data/iam/security-credentials/";
        self.as_thief(address, || {
            self.thief.netns().shell(&format!("curl -gsm 2 --interface {address} http://{service}/{path} || true"))
        })
    }

    /// Which SYNs in disguise reach the node's IP layer as the victim's.
    fn disguised(&self, address: IpAddr) -> Result<Vec<(&'static str, bool)>> {
        let mut arrived = Vec::new();
        for frame in frames::disguises(address, &self.thief.mac(), &self.mac()?) {
            self.sent(address, &frame.frames)?;
            arrived.push((frame.name, counted(self.site.node.netns(), "first")? > 0));
        }
        Ok(arrived)
    }

    /// Sends frames, and after them a SYN of the thief's own; returns when the node has got that.
    fn sent(&self, victim: IpAddr, frames: &[Vec<u8>]) -> Result<()> {
        let node = self.site.node.netns();
        let own = frames::disguises(self.thief.ip().into(), &self.thief.mac(), &self.mac()?).swap_remove(0).frames;
        count(node, "tcp dport 80", [victim, self.thief.ip().into()])?;
        frames::send(&self.thief, &[frames, &own].concat())?;
        poll("the thief's own SYN", PATIENCE, || counted(node, "second").is_ok_and(|count| count > 0).then_some(()))
    }

    /// Whether the victim gets an answer that the thief sends as the metadata service.
    fn answers_as_service(&self, service: IpAddr) -> Result<bool> {
        let (victim, own) = (self.victim.netns(), self.thief.ip().into());
        count(victim, "tcp sport 80", [service, own])?;
        let frames = [service, own].map(|source| frames::answer(source, &self.thief.mac(), &self.victim));
        frames::send(&self.thief, &frames)?;
        poll("the thief's own segment", PATIENCE, || {
            counted(victim, "second").is_ok_and(|count| count > 0).then_some(())
        })?;
        Ok(counted(victim, "first")? > 0)
    }

    /// Whether the node would send the victim's answers to the thief once that has claimed its address.
    fn claims(&self, address: IpAddr) -> Result<Vec<(&'static str, bool)>> {
        let (node, thief) = (self.site.node.netns(), self.thief.netns());
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
        self.as_thief(address, || {
            reset()?;
            // Asks for the gateway's MAC address, and names its own as the victim's.
            thief.run(|| UdpSocket::bind((address, 0))?.send_to(b"?", (gateway, 9)))?;
            self.sent(address, &[])?;
            let asking = is_hijacked()?;
            reset()?;
            for (family, name) in [("ipv4", "arp_notify"), ("ipv6", "ndisc_notify")] {
                thief.sysctl(&format!("{family}/conf/eth0/{name}"), "1")?;
            }
            // Its kernel announces all its addresses then.
            thief.ip([format!("link set eth0 address 0a:00:00:00:ff:{:02x}", u8::from(address.is_ipv4()))])?;
            self.sent(address, &[])?;
            let announcing = is_hijacked()?;
            thief.ip([format!("link set eth0 address {}", self.thief.mac())])?;
            reset()?;
            Ok(vec![("asks for the gateway", asking), ("announces itself", announcing)])
        })
    }

    /// Whether the bridge sends to the thief's port what is for the victim's MAC address.
    fn moves_mac(&self) -> Result<Vec<(&'static str, bool)>> {
        let node = self.site.node.netns();
        let mac = self.victim.mac();
        let mut moved = Vec::new();
        let whole = frames::disguises(self.thief.ip().into(), &mac, &self.mac()?).swap_remove(0).frames;
        for (name, frames) in [("request", whole), ("LLDP", vec![frames::reserved_multicast(&mac)])] {
            self.all_are_served()?;
            self.sent(self.victim.ip().into(), &frames)?;
            let port = node.shell(&format!("bridge fdb show br cni0 | grep {mac}"))?;
            moved.push((name, port.contains(&format!("dev {} ", self.thief.host_interface()))));
        }
        Ok(moved)
    }

    /// Every attack, and whether it worked.
    fn attacks(&self) -> Result<Vec<(String, bool)>> {
        let mut attacks = Vec::new();
        for address in self.victim.address().ips() {
            attacks.push((format!("{address}: asks"), self.asks_as(address)? == role("victim")));
            let service = if address.is_ipv4() { METADATA.into() } else { METADATA6.into() };
            attacks.push((format!("answers as {service}"), self.answers_as_service(service)?));
            let disguised = self.disguised(address)?.into_iter().map(|(name, worked)| (format!("SYN, {name}"), worked));
            let claims = self.claims(address)?.into_iter().map(|(name, worked)| (name.to_owned(), worked));
            attacks.extend(disguised.chain(claims).map(|(name, worked)| (format!("{address}: {name}"), worked)));
        }
        attacks.extend(self.moves_mac()?.into_iter().map(|(name, worked)| (format!("MAC address: {name}"), worked)));
        Ok(attacks)
    }

    fn table(&self) -> String {
        self.site.node.netns().shell("nft --stateless list table bridge kirsa").unwrap_or_default()
    }
}

/// Counts what reaches a namespace from two addresses.
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
fn neighbors_on_a_bridge_get_nothing_of_each_other() -> Result<()> {
    let bridge = Bridge::new("nft")?;
    let agent = bridge.start("guarded")?;
    let attacks = bridge.attacks()?;
    ensure!(attacks.iter().all(|(_, worked)| !worked), "{attacks:#?}");
    bridge.all_are_served()?;
    agent.stop()
}

/// Without this the test above would prove nothing.
#[test]
fn unguarded_bridges_are_open_to_neighbors() -> Result<()> {
    let bridge = Bridge::new("iptables")?;
    let agent = bridge.start("open")?;
    let attacks = bridge.attacks()?;
    ensure!(attacks.iter().all(|(_, worked)| *worked), "{attacks:#?}");
    agent.wait_for_log(|entry| entry["message"].as_str().is_some_and(|said| said.contains("share a Linux bridge")))?;
    agent.stop()
}
