//! Raw frames of a program with CAP_NET_RAW: a SYN to the metadata address from another pod's address, plain, with VLAN
//! tags and in fragments, which the kernel removes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use lab::net::{METADATA, METADATA6, Pod};

const TCP: u8 = 6;
const IPV6_FRAGMENT: u8 = 44;

pub(super) struct Frame {
    pub(super) name: &'static str,
    /// The frames, in the order in which they are sent.
    pub(super) frames: Vec<Vec<u8>>,
}

/// Returns a SYN from `source` in every encapsulation, addressed to the bridge.
pub(super) fn spoofed_syns(source: IpAddr, from: &str, bridge: &str) -> Vec<Frame> {
    const PRIORITY: [u8; 4] = [0x81, 0, 0, 0];
    const NESTED: [u8; 8] = [0x88, 0xa8, 0, 0, 0x81, 0, 0, 0];
    let (protocol, whole, fragments) = match source {
        IpAddr::V4(source) => {
            // The first fragment contains the ports.
            let (syn, more) = (segment(40_000, 80), 0x2000);
            let (first, rest) = syn.split_at(8);
            let ipv4 = |fragment, payload| ipv4(source, METADATA, fragment, payload);
            (0x0800, ipv4(0, &syn), vec![ipv4(more, first), ipv4(1, rest)])
        }
        IpAddr::V6(source) => {
            let syn = segment(40_000, 80);
            let fragment = [&[TCP, 0, 0, 0, 0, 0, 0, 7][..], &syn].concat();
            let ipv6 = |next, payload| ipv6(source, METADATA6, next, payload);
            (0x86dd, ipv6(TCP, &syn), vec![ipv6(IPV6_FRAGMENT, &fragment)])
        }
    };
    let one = |name, tags: &[u8]| Frame { name, frames: vec![ethernet(bridge, from, tags, protocol, &whole)] };
    vec![
        one("plain", &[]),
        one("priority tag", &PRIORITY),
        one("nested priority tags", &NESTED),
        Frame {
            name: "fragments",
            frames: fragments.iter().map(|packet| ethernet(bridge, from, &[], protocol, packet)).collect(),
        },
    ]
}

/// Returns a segment to another pod on the bridge, from port 80 of any address.
pub(super) fn response(source: IpAddr, from: &str, to: &Pod) -> Vec<u8> {
    let segment = segment(80, 40_000);
    match (source, to.address().v6) {
        (IpAddr::V6(source), Some(address)) => {
            ethernet(&to.mac(), from, &[], 0x86dd, &ipv6(source, address, TCP, &segment))
        }
        (IpAddr::V4(source), _) => ethernet(&to.mac(), from, &[], 0x0800, &ipv4(source, to.ip(), 0, &segment)),
        (IpAddr::V6(_), None) => Vec::new(),
    }
}

/// Returns a frame to a reserved multicast address, from which bridges learn the sender's address.
pub(super) fn reserved_multicast(from: &str) -> Vec<u8> {
    [&[0x01, 0x80, 0xc2, 0, 0, 0x0e][..], &mac(from), &[0x88, 0xcc], &[0; 46]].concat()
}

/// Sends raw frames from the pod's interface.
pub(super) fn send(pod: &Pod, frames: &[Vec<u8>]) -> Result<()> {
    let hex = |frame: &Vec<u8>| frame.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let frames: Vec<String> = frames.iter().map(hex).collect();
    pod.netns().shell(&format!(
        "python3 -c \"import socket; s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); s.bind(('eth0', 0)); \
         [s.send(bytes.fromhex(f)) for f in '{}'.split()]\"",
        frames.join(" ")
    ))?;
    Ok(())
}

fn ethernet(to: &str, from: &str, tags: &[u8], protocol: u16, packet: &[u8]) -> Vec<u8> {
    [&mac(to)[..], &mac(from), tags, &protocol.to_be_bytes(), packet].concat()
}

fn mac(text: &str) -> [u8; 6] {
    let bytes: Vec<u8> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

/// Returns a TCP SYN without a checksum.
fn segment(source: u16, destination: u16) -> Vec<u8> {
    let ports = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    [&ports[..], &[0; 8], &[0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]].concat()
}

fn ipv4(source: Ipv4Addr, destination: Ipv4Addr, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut header = [&[0x45, 0][..], &length, &[0, 7], &fragment.to_be_bytes(), &[64, TCP, 0, 0]].concat();
    header.extend(source.octets());
    header.extend(destination.octets());
    let sum: u32 = header.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let checksum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    header.extend(payload);
    header
}

fn ipv6(source: Ipv6Addr, destination: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    [&[0x60, 0, 0, 0][..], &length, &[next, 64], &source.octets(), &destination.octets(), payload].concat()
}
