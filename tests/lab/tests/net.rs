//! The lab's own network, before anything redirects.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};
use lab::namespace::{BASE, BASE6, has_ipv6};
use lab::net::{METADATA, METADATA6, Node, Pod, Shape};

lab::enter!();

/// Says to each caller which address it is seen as.
fn echo_peer(listener: TcpListener) {
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("accept");
            let peer = stream.peer_addr().expect("a connected socket has a peer");
            write!(stream, "{}", peer.ip()).expect("the caller reads");
        }
    });
}

fn seen_as(mut stream: TcpStream) -> Result<IpAddr> {
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.parse()?)
}

fn reaches(pod: &Pod, address: impl Into<SocketAddr>, source: impl Into<IpAddr>) -> Result<()> {
    let (address, source) = (address.into(), source.into());
    let what = || format!("{:?} to {address}", pod.shape());
    let seen = seen_as(pod.connect(address).with_context(what)?).with_context(what)?;
    ensure!(seen == source, "{}: seen as {seen}, not as {source}", what());
    Ok(())
}

#[test]
fn a_pod_of_each_shape_reaches_the_metadata_address_outside_its_node_the_base_and_the_host() -> Result<()> {
    let node = Node::new()?;
    echo_peer(node.listen_metadata()?);
    echo_peer(node.listen((node.host_ip(), 8181).into())?);
    let base = TcpListener::bind((BASE, 0))?;
    let port = base.local_addr()?.port();
    echo_peer(base);
    for shape in Shape::ALL {
        let pod = node.pod("p", shape)?;
        for address in [(METADATA, 80), (node.host_ip(), 8181), (BASE, port)] {
            reaches(&pod, address, pod.ip())?;
        }
    }
    Ok(())
}

#[test]
fn the_same_in_ipv6() -> Result<()> {
    let node = Node::new()?;
    let (Some(host), Some(canary)) = (node.host_ip6(), node.listen_metadata6()?) else {
        ensure!(!has_ipv6());
        return Ok(());
    };
    echo_peer(canary);
    echo_peer(node.listen((host, 8181).into())?);
    let base = TcpListener::bind((BASE6, 0))?;
    let port = base.local_addr()?.port();
    echo_peer(base);
    for shape in Shape::ALL {
        let pod = node.pod("p", shape)?;
        for address in [(METADATA6, 80), (host, 8181), (BASE6, port)] {
            reaches(&pod, address, pod.ip6().context("the node has IPv6")?)?;
        }
    }
    Ok(())
}

#[test]
fn the_node_and_the_base_reach_each_other_and_the_node_the_metadata_address() -> Result<()> {
    let node = Node::new()?;
    echo_peer(node.listen_metadata()?);
    let seen = seen_as(node.netns().connect((METADATA, 80).into(), std::time::Duration::from_secs(1))?)?;
    ensure!(seen == IpAddr::V4(node.host_ip()), "{seen}");
    echo_peer(node.listen((node.host_ip(), 9000).into())?);
    seen_as(TcpStream::connect((node.host_ip(), 9000))?)?;
    Ok(())
}

#[test]
fn a_deleted_pods_address_can_be_given_to_the_next() -> Result<()> {
    let node = Node::new()?;
    echo_peer(node.listen_metadata()?);
    let address = node.allocate();
    let mut open = Vec::new();
    for shape in Shape::ALL.into_iter().cycle().take(6) {
        let pod = node.pod_at("p", shape, address)?;
        reaches(&pod, (METADATA, 80), address.v4)?;
        // A socket that outlives its pod must not stand in the way.
        open.push(pod.connect((METADATA, 80))?);
        pod.delete();
    }
    Ok(())
}

#[test]
fn programs_in_a_pod_see_its_interface_and_no_other() -> Result<()> {
    let node = Node::new()?;
    let pod = node.pod("p", Shape::RoutedBare)?;
    let links = String::from_utf8(pod.run(Command::new("ip").args(["-o", "link"]))?.stdout)?;
    ensure!(links.lines().count() == 2 && links.contains("eth0"), "{links}");
    let out = node.netns().shell(&format!("ip -4 addr show dev {}", pod.host_interface()))?;
    ensure!(out.is_empty(), "the host end has an address: {out}");
    Ok(())
}
