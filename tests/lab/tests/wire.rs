//! The lab's client, processes and CNI records, each against something that is not kirsa.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::cni::Sandbox;
use lab::net::{Node, Shape};
use lab::process::Process;
use serde_json::Value;

lab::enter!();

const SECOND: Duration = Duration::from_secs(1);

/// Answers each request of one connection with the next of `answers`, then closes it; the number of the
/// connection is in a header.
fn serve(listener: TcpListener, answers: &'static [&'static str]) {
    thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            let mut stream = BufReader::new(stream.expect("accept"));
            for answer in answers {
                // To the end of the request's head.
                let mut line = String::new();
                while stream.read_line(&mut line).expect("the client writes") > 2 {
                    line.clear();
                }
                let (status, rest) = answer.split_once('\n').expect("a status line");
                write!(stream.get_mut(), "HTTP/1.1 {status}\r\nX-Connection: {number}\r\n{rest}")
                    .expect("the client reads");
            }
        }
    });
}

#[test]
fn the_client_keeps_its_connection_and_makes_a_new_one_when_it_is_closed() -> Result<()> {
    let node = Node::new()?;
    serve(
        node.listen_metadata()?,
        &[
            "200 OK\nContent-Length: 5\r\n\r\ntoken",
            "404 Not Found\nTransfer-Encoding: chunked\r\n\r\n3\r\nno \r\n4\r\nrole\r\n0\r\n\r\n",
        ],
    );
    let pod = node.pod("p", Shape::Bridge)?;
    let mut imds = pod.imds();
    ensure!(imds.put_token(60)? == "token");
    let list = imds.get("/").send()?;
    ensure!(list.status == 404 && list.body == "no role" && list.header("x-connection") == Some("0"), "{list:?}");
    let again = imds.get("/").send()?;
    ensure!(again.header("x-connection") == Some("1"), "{again:?}");
    Ok(())
}

#[test]
fn a_process_is_waited_for_line_by_line() -> Result<()> {
    let mut command = Command::new("sh");
    command.args(["-c", "echo one; echo two >&2; read forever || exit 3"]);
    let mut process = Process::spawn(None, "sh", command)?;
    process.wait_for_line(SECOND, |line| line == "two")?;
    let error = process.wait_for_line(SECOND, |line| line == "three").expect_err("there is no such line");
    ensure!(error.to_string().contains("ended") && error.to_string().contains("two"), "{error}");
    ensure!(process.wait(SECOND)?.code() == Some(3));
    Ok(())
}

#[test]
fn a_process_lives_in_its_namespace_and_ends_with_its_handle() -> Result<()> {
    let node = Node::new()?;
    let mut command = Command::new("sh");
    command.args(["-c", "ip -o addr show dev eth0; exec sleep 1000"]);
    let process = Process::spawn(Some(node.netns()), "sh", command)?;
    process.wait_for_line(SECOND, |line| line.contains(&node.host_ip().to_string()))?;
    let proc = format!("/proc/{}", process.id());
    drop(process);
    ensure!(!fs::exists(proc)?);
    Ok(())
}

#[test]
fn a_cni_record_names_pod_addresses_and_interfaces_and_only_root_reads_it() -> Result<()> {
    let node = Node::new()?;
    let pod = node.pod("reader", Shape::Bridge)?;
    let results = node.cni_results()?;
    let sandbox = Sandbox::new("default", "reader", "794615a3-a960-49e8-a5e3-adaac8bcff29");
    results.add(&sandbox, &pod)?;
    ensure!(fs::metadata(results.folder())?.permissions().mode() & 0o777 == 0o700);
    ensure!(sandbox.id.len() == 64);

    let path = results.folder().join(format!("kit-{}-eth0", sandbox.id));
    ensure!(fs::metadata(&path)?.permissions().mode() & 0o777 == 0o600);
    let record: Value = serde_json::from_slice(&fs::read(&path)?)?;
    let eth0 = record["result"]["ips"][0]["interface"].as_u64().context("an index")?;
    let eth0 = &record["result"]["interfaces"][usize::try_from(eth0)?];
    ensure!(eth0["name"] == "eth0" && eth0["mac"] == pod.mac().as_str(), "{record}");
    ensure!(record["result"]["ips"][0]["address"] == format!("{}/24", pod.ip()), "{record}");
    ensure!(node.netns().shell(&format!("ip link show {}", pod.host_interface()))?.contains(&pod.host_mac()));

    results.truncate(&sandbox)?;
    ensure!(serde_json::from_slice::<Value>(&fs::read(&path)?).is_err());
    results.remove(&sandbox)?;
    results.remove(&sandbox)?;
    ensure!(fs::read_dir(results.folder())?.count() == 0);
    Ok(())
}
