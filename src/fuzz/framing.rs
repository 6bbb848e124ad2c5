//! A second HTTP/1 parser: finds the requests that a server may see on a connection, by RFC 9112
//! (<https://www.rfc-editor.org/rfc/rfc9112>) and with every leniency of real servers. It rejects less than the tested
//! parser, so each response must match a request here, in order.

/// A request, as sent.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) method: String,
    /// The request target without query and fragment.
    pub(super) target: String,
    headers: Vec<(String, Vec<u8>)>,
}

/// A response.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) body: String,
}

impl Request {
    /// Returns all values of a header.
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.headers.iter().filter(move |(known, _)| known == name).map(|(_, value)| value.as_slice())
    }

    pub(super) fn first<'a>(&'a self, name: &'a str) -> Option<&'a [u8]> {
        self.all(name).next()
    }
}

/// Returns all requests up to the first malformed one.
pub(super) fn requests(mut sent: &[u8]) -> Vec<Request> {
    let mut requests = Vec::new();
    while let Some(request) = request(&mut sent) {
        let rest = after_body(&request, sent);
        requests.push(request);
        match rest {
            Some(rest) => sent = rest,
            None => break,
        }
    }
    requests
}

fn request(sent: &mut &[u8]) -> Option<Request> {
    let mut first = line(sent)?;
    while first.is_empty() {
        first = line(sent)?;
    }
    let text = String::from_utf8_lossy(first);
    let mut words = text.split(' ').filter(|word| !word.is_empty());
    let (method, target) = (words.next()?.to_owned(), words.next()?);
    let target = target.split(['?', '#']).next()?.to_owned();
    let mut headers = Vec::new();
    loop {
        let header = line(sent)?;
        if header.is_empty() {
            return Some(Request { method, target, headers });
        }
        let colon = header.iter().position(|byte| *byte == b':')?;
        let name = String::from_utf8_lossy(header[..colon].trim_ascii()).to_ascii_lowercase();
        headers.push((name, header[colon + 1..].trim_ascii().to_vec()));
    }
}

/// Returns the bytes after the body, or `None` if its end is unknown or missing.
fn after_body<'a>(request: &Request, sent: &'a [u8]) -> Option<&'a [u8]> {
    if let Some(coding) = request.all("transfer-encoding").last() {
        let last = coding.rsplit(|byte| *byte == b',').next()?.trim_ascii();
        return last.eq_ignore_ascii_case(b"chunked").then(|| after_chunks(sent)).flatten();
    }
    let mut lengths = request.all("content-length").map(|length| std::str::from_utf8(length).ok()?.parse().ok());
    let Some(length) = lengths.next() else { return Some(sent) };
    let length: Option<usize> = length;
    if lengths.any(|other| other != length) {
        return None;
    }
    sent.get(length?..)
}

/// In chunked bodies, hyper ends lines at CR LF only: either alone belongs to the line.
fn after_chunks(mut sent: &[u8]) -> Option<&[u8]> {
    loop {
        let size = strict_line(&mut sent)?;
        let digits = size.split(|byte| *byte == b';').next()?.trim_ascii();
        let size = usize::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        if size == 0 {
            while !strict_line(&mut sent)?.is_empty() {}
            return Some(sent);
        }
        sent = sent.get(size..)?;
        strict_line(&mut sent).filter(|line| line.is_empty())?;
    }
}

fn strict_line<'a>(sent: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = sent.iter().position(|byte| *byte == b'\r').filter(|end| sent.get(end + 1) == Some(&b'\n'))?;
    let line = &sent[..end];
    *sent = &sent[end + 2..];
    Some(line)
}

/// Takes a line that ends with LF or CR LF.
fn line<'a>(sent: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = sent.iter().position(|byte| *byte == b'\n')?;
    let line = &sent[..end];
    *sent = &sent[end + 1..];
    Some(line.strip_suffix(b"\r").unwrap_or(line))
}

/// Parses the responses to these requests, without interim ones. Panics if one is malformed or cut short.
pub(super) fn responses(mut received: &str, requests: &[Request]) -> Vec<Response> {
    let mut responses = Vec::new();
    while !received.is_empty() {
        let (head, rest) = received.split_once("\r\n\r\n").unwrap_or_else(|| panic!("cut short: {received}"));
        let status: u16 = head
            .strip_prefix("HTTP/1.")
            .and_then(|head| head.split(' ').nth(1)?.parse().ok())
            .unwrap_or_else(|| panic!("no status line: {received}"));
        received = rest;
        if status == 100 {
            continue;
        }
        let is_head = requests.get(responses.len()).is_some_and(|request| request.method == "HEAD");
        let length = head.split("\r\n").find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        let length = if is_head { 0 } else { length.unwrap_or(0) };
        let (body, rest) = received.split_at_checked(length).unwrap_or_else(|| panic!("cut short: {received}"));
        responses.push(Response { status, body: body.to_owned() });
        received = rest;
    }
    responses
}
