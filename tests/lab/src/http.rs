//! A small blocking HTTP/1.1 client: one connection, kept alive, that shows what is on the wire.
//! Knows what an IMDS client asks for, not what should be answered.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::net::{METADATA, METADATA6, Pod};
use crate::netns::Netns;

mod wire;

pub use wire::Wire;

/// Longer than the service may ever hold a request.
const TIMEOUT: Duration = Duration::from_secs(6);

pub const TOKEN: &str = "x-aws-ec2-metadata-token";
pub const TOKEN_TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";
pub const CREDENTIALS_PATH: &str = "/latest/meta-data/iam/security-credentials/";

#[derive(Debug)]
pub struct Client {
    netns: Arc<Netns>,
    address: SocketAddr,
    stream: Option<BufReader<TcpStream>>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_str(&self.body).with_context(|| format!("not JSON: {:?}", self.body))
    }

    /// When the credentials in this answer expire, in seconds since 1970.
    pub fn expires(&self) -> Result<i64> {
        let document = self.json()?;
        let text = document["Expiration"].as_str().context("an expiration")?;
        Ok(text.parse::<jiff::Timestamp>().with_context(|| text.to_owned())?.as_second())
    }

    /// The body of a 200; any other status is an error that shows it.
    pub fn ok(self) -> Result<String> {
        if self.status != 200 {
            bail!("{}: {:?}", self.status, self.body);
        }
        Ok(self.body)
    }
}

#[derive(Debug)]
pub struct Request<'a> {
    client: &'a mut Client,
    head: String,
}

impl Client {
    pub fn new(netns: &Arc<Netns>, address: impl Into<SocketAddr>) -> Self {
        Self { netns: netns.clone(), address: address.into(), stream: None }
    }

    pub fn get(&mut self, path: &str) -> Request<'_> {
        self.request("GET", path)
    }

    pub fn put(&mut self, path: &str) -> Request<'_> {
        self.request("PUT", path)
    }

    pub fn request(&mut self, method: &str, path: &str) -> Request<'_> {
        let host = match self.address.ip() {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        };
        let head = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n");
        Request { client: self, head }
    }

    /// An IMDSv2 session token.
    pub fn put_token(&mut self, ttl: u32) -> Result<String> {
        self.put("/latest/api/token").header(TOKEN_TTL, &ttl.to_string()).send()?.ok().context("token")
    }

    /// The role list, as IMDSv2 asks for it.
    pub fn role_list(&mut self) -> Result<Response> {
        self.get_v2(CREDENTIALS_PATH)
    }

    /// The credentials under `role`, as IMDSv2 asks for them.
    pub fn credentials(&mut self, role: &str) -> Result<Response> {
        self.get_v2(&format!("{CREDENTIALS_PATH}{role}"))
    }

    fn get_v2(&mut self, path: &str) -> Result<Response> {
        let token = self.put_token(21_600)?;
        self.get(path).header(TOKEN, &token).send()
    }

    /// Send these bytes and read one response.
    pub fn raw(&mut self, bytes: &[u8]) -> Result<Response> {
        let what = format!("{} from {}", self.address, self.netns.name());
        let reused = self.stream.is_some();
        match self.exchange(bytes) {
            // The server may have closed an idle connection; a second try is on a new one.
            Err(_) if reused => self.exchange(bytes).context(what),
            other => other.context(what),
        }
    }

    fn exchange(&mut self, bytes: &[u8]) -> Result<Response> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => BufReader::new(self.connect()?),
        };
        stream.get_mut().write_all(bytes)?;
        let head = bytes.starts_with(b"HEAD ");
        let response = read_response(&mut stream, head)?;
        if response.header("connection") != Some("close") {
            self.stream = Some(stream);
        }
        Ok(response)
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let stream = self.netns.connect(self.address, TIMEOUT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        Ok(stream)
    }
}

impl Request<'_> {
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.head += &format!("{name}: {value}\r\n");
        self
    }

    pub fn send(self) -> Result<Response> {
        self.client.raw(format!("{}\r\n", self.head).as_bytes())
    }
}

impl Pod {
    /// What an SDK in this pod talks to.
    pub fn imds(&self) -> Client {
        Client::new(self.netns(), (METADATA, 80))
    }

    /// The same on the IPv6 address.
    pub fn imds6(&self) -> Client {
        Client::new(self.netns(), (METADATA6, 80))
    }
}

fn read_response(stream: &mut impl BufRead, without_body: bool) -> Result<Response> {
    let status_line = read_line(stream)?;
    let status = status_line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let mut response = Response {
        status: status.with_context(|| format!("not a status line: {status_line:?}"))?,
        headers: Vec::new(),
        body: String::new(),
    };
    loop {
        let line = read_line(stream)?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').with_context(|| format!("not a header: {line:?}"))?;
        response.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    if response.status == 100 {
        return read_response(stream, without_body);
    }
    if !without_body {
        response.body = String::from_utf8(read_body(stream, &response)?)?;
    }
    Ok(response)
}

fn read_body(stream: &mut impl BufRead, response: &Response) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    if let Some(length) = response.header("content-length") {
        body.resize(length.parse()?, 0);
        stream.read_exact(&mut body)?;
    } else if response.header("transfer-encoding") == Some("chunked") {
        loop {
            let mut chunk = vec![0; usize::from_str_radix(&read_line(stream)?, 16)?];
            stream.read_exact(&mut chunk)?;
            read_line(stream)?;
            if chunk.is_empty() {
                break;
            }
            body.append(&mut chunk);
        }
    } else {
        stream.read_to_end(&mut body)?;
    }
    Ok(body)
}

fn read_line(stream: &mut impl BufRead) -> Result<String> {
    let mut line = String::new();
    if stream.read_line(&mut line)? == 0 {
        bail!("the server closed the connection");
    }
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}
