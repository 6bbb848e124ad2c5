//! A second reader of what stands on a connection: which requests a server may see there, by RFC 9112 and with every
//! leniency that some server has. It rejects less than the one that is tested, so whatever that one answers must be found
//! here at the same place.

/// One request, as it was sent.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) method: String,
    /// Without query and fragment.
    pub(super) target: String,
    headers: Vec<(String, Vec<u8>)>,
}

/// One answer.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) body: String,
}

impl Request {
    /// Each header of this name.
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.headers.iter().filter(move |(known, _)| known == name).map(|(_, value)| value.as_slice())
    }

    pub(super) fn first<'a>(&'a self, name: &'a str) -> Option<&'a [u8]> {
        self.all(name).next()
    }
}

/// All that can be told apart; what comes after something that cannot be read is no request's.
pub(super) fn requests(mut sent: &[u8]) -> Vec<Request> {
    let mut requests = Vec::new();
    while let Some(request) = request(&mut sent) {
        let rest = body(&request, sent);
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

/// What follows the body. `None` where nobody can say where it ends, or it has not ended.
fn body<'a>(request: &Request, sent: &'a [u8]) -> Option<&'a [u8]> {
    if let Some(coding) = request.all("transfer-encoding").last() {
        let last = coding.rsplit(|byte| *byte == b',').next()?.trim_ascii();
        return last.eq_ignore_ascii_case(b"chunked").then(|| chunks(sent)).flatten();
    }
    let mut lengths = request.all("content-length").map(|length| std::str::from_utf8(length).ok()?.parse().ok());
    let Some(length) = lengths.next() else { return Some(sent) };
    let length: Option<usize> = length;
    if lengths.any(|other| other != length) {
        return None;
    }
    sent.get(length?..)
}

/// Here hyper ends a line at a carriage return and a line feed only: one without the other belongs to the line.
fn chunks(mut sent: &[u8]) -> Option<&[u8]> {
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

/// Up to the next line feed, with or without a carriage return before it.
fn line<'a>(sent: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = sent.iter().position(|byte| *byte == b'\n')?;
    let line = &sent[..end];
    *sent = &sent[end + 1..];
    Some(line.strip_suffix(b"\r").unwrap_or(line))
}

/// What was answered to these, whole and one after the other; interim answers are none.
pub(super) fn responses(mut said: &str, requests: &[Request]) -> Vec<Response> {
    let mut responses = Vec::new();
    while !said.is_empty() {
        let (head, rest) = said.split_once("\r\n\r\n").unwrap_or_else(|| panic!("cut short: {said}"));
        let status: u16 = head
            .strip_prefix("HTTP/1.")
            .and_then(|head| head.split(' ').nth(1)?.parse().ok())
            .unwrap_or_else(|| panic!("no status line: {said}"));
        said = rest;
        if status == 100 {
            continue;
        }
        let of_head = requests.get(responses.len()).is_some_and(|request| request.method == "HEAD");
        let length = head.split("\r\n").find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        let length = if of_head { 0 } else { length.unwrap_or(0) };
        let (body, rest) = said.split_at_checked(length).unwrap_or_else(|| panic!("cut short: {said}"));
        responses.push(Response { status, body: body.to_owned() });
        said = rest;
    }
    responses
}
