//! IMDSv2 session tokens: stateless, an HMAC over the pod and the expiry, so that they outlive a restart of the agent
//! and are useless to another pod. SDKs cache a token for up to six hours and some never ask for another one after a
//! 401, so one that was issued must stay good.
//!
//! A token may be asked for before anybody knows which pod has the address, and must not wait for that. Such a token
//! is bound to the address instead, and to pods that existed when it was issued.
//!
//! The Common Runtime of AWS has room for a token of 64 bytes and fails with a longer one; those of EC2 have 56.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    net::IpAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

use aws_lc_rs::{
    hmac,
    rand::{SecureRandom, SystemRandom},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use tracing::{info, warn};
use zeroize::Zeroizing;

use crate::{attribute::Workload, clock::UnixTime};

/// What IMDSv2 allows, in seconds (EC2 User Guide, "Use IMDSv2").
pub const TTL: std::ops::RangeInclusive<u32> = 1..=21_600;

/// In bytes.
pub const KEY_LENGTH: usize = 32;
/// In the state directory.
pub const KEY_FILE: &str = "session-token.key";
const MAC_LENGTH: usize = 32;
/// The seconds of the epoch, in the bytes that they need for the next 34,000 years.
const TIME_LENGTH: usize = 5;
/// How much later than its token a pod may seem to have been created, by the API server's clock: what AWS tolerates of
/// clocks. SDKs that hold a token which is refused for as long as it lasts never ask for another.
const CLOCK_TOLERANCE: u64 = 300;

/// Whom a token is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Binding {
    Pod = 1,
    Address = 2,
}

/// Issues and checks tokens.
pub struct Sessions {
    key: hmac::Key,
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sessions")
    }
}

/// A token that is well-formed and has not expired. Whether it is authentic shows with whose it is.
#[derive(Debug)]
pub struct Session {
    binding: Binding,
    issued: u64,
    expires: u64,
    mac: [u8; MAC_LENGTH],
}

impl Session {
    /// Bound to a pod, rather than to an address.
    pub fn is_a_pods(&self) -> bool {
        self.binding == Binding::Pod
    }
}

impl Sessions {
    /// With the key in the state directory; one that is missing or damaged is replaced.
    ///
    /// # Errors
    /// No random numbers are to be had.
    pub fn open(state_dir: &Path) -> anyhow::Result<Self> {
        match read_key(state_dir) {
            Ok(Some(key)) => return Ok(Self::with_key(&key)),
            Ok(None) => info!(dir = %state_dir.display(), "no key of session tokens yet: making one"),
            Err(error) => warn!(
                dir = %state_dir.display(), %error,
                "the key of session tokens cannot be used: making a new one; SDKs that hold a token must ask again"
            ),
        }
        let mut key = Zeroizing::new([0; KEY_LENGTH]);
        SystemRandom::new().fill(&mut *key).map_err(|_| anyhow::anyhow!("no random numbers for a key"))?;
        if let Err(error) = write_key(state_dir, &*key) {
            warn!(
                dir = %state_dir.display(), %error,
                "the key of session tokens cannot be kept (--state-dir): tokens will not outlive this process"
            );
        }
        Ok(Self::with_key(&key))
    }

    pub(crate) fn with_key(key: &[u8; KEY_LENGTH]) -> Self {
        Self { key: hmac::Key::new(hmac::HMAC_SHA256, key) }
    }

    /// A token for the pod if it is known, for the address otherwise.
    pub fn issue(&self, workload: Option<&Workload>, source: IpAddr, ttl: u32, now: UnixTime) -> String {
        let binding = if workload.is_some() { Binding::Pod } else { Binding::Address };
        let expires = now.0 + u64::from(ttl);
        let mac = hmac::sign(&self.key, &message(binding, now.0, expires, workload, source));
        let mut token = vec![binding as u8];
        token.extend(short(now.0));
        token.extend(short(expires));
        token.extend(mac.as_ref());
        URL_SAFE_NO_PAD.encode(token)
    }

    /// Reads a token; `None` for what cannot be one of ours, or has expired, whoever presents it.
    pub fn read(&self, token: &[u8], now: UnixTime) -> Option<Session> {
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (binding, rest) = bytes.split_first()?;
        let (issued, rest) = rest.split_first_chunk()?;
        let (expires, mac) = rest.split_first_chunk()?;
        let session = Session {
            binding: match binding {
                1 => Binding::Pod,
                2 => Binding::Address,
                _ => return None,
            },
            issued: long(*issued),
            expires: long(*expires),
            mac: mac.try_into().ok()?,
        };
        // Both times are cut to whole seconds: only a second later has the token lived its TTL for sure.
        (now.0 <= session.expires).then_some(session)
    }

    /// Whether the token was issued to whoever is calling; true for a pod's own while nobody knows which pod that is.
    pub fn may_belong(&self, session: &Session, workload: Option<&Workload>, source: IpAddr) -> bool {
        match workload {
            Some(workload) => self.belongs(session, workload, source),
            None => session.is_a_pods() || self.authentic(session, None, source),
        }
    }

    /// Whether the token was issued to this pod.
    pub fn belongs(&self, session: &Session, workload: &Workload, source: IpAddr) -> bool {
        let existed = session.is_a_pods() || workload.created().0 <= session.issued + CLOCK_TOLERANCE;
        self.authentic(session, session.is_a_pods().then_some(workload), source) && existed
    }

    /// In constant time.
    fn authentic(&self, session: &Session, pod: Option<&Workload>, source: IpAddr) -> bool {
        let message = message(session.binding, session.issued, session.expires, pod, source);
        hmac::verify(&self.key, &message, &session.mac).is_ok()
    }
}

fn short(seconds: u64) -> [u8; TIME_LENGTH] {
    let [_, _, _, time @ ..] = seconds.to_be_bytes();
    time
}

fn long(time: [u8; TIME_LENGTH]) -> u64 {
    time.iter().fold(0, |seconds, byte| seconds << 8 | u64::from(*byte))
}

fn message(binding: Binding, issued: u64, expires: u64, pod: Option<&Workload>, source: IpAddr) -> Vec<u8> {
    let mut message = b"kirsa session token 1\0".to_vec();
    message.push(binding as u8);
    message.extend(issued.to_be_bytes());
    message.extend(expires.to_be_bytes());
    match pod {
        Some(workload) => message.extend(workload.uid().0.as_bytes()),
        None => message.extend(source.to_string().as_bytes()),
    }
    message
}

fn read_key(state_dir: &Path) -> io::Result<Option<Zeroizing<[u8; KEY_LENGTH]>>> {
    let mut file = match File::open(state_dir.join(KEY_FILE)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut key = Zeroizing::new([0; KEY_LENGTH]);
    file.read_exact(&mut *key)?;
    if file.read(&mut [0])? != 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is longer than a key"));
    }
    Ok(Some(key))
}

/// Written aside and renamed, so that a crash leaves the old key or the new one, never half of one.
fn write_key(state_dir: &Path, key: &[u8]) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir)?;
    let (aside, path) = (state_dir.join(format!("{KEY_FILE}.new")), state_dir.join(KEY_FILE));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
    file.write_all(key)?;
    file.sync_all()?;
    fs::rename(aside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixTime = UnixTime(1_700_000_000);

    fn parts() -> (Sessions, Workload, IpAddr) {
        (Sessions::with_key(&[7; KEY_LENGTH]), Workload::sample("a", "uid-a", "sa"), [10, 0, 0, 1].into())
    }

    fn accepts(sessions: &Sessions, token: &str, pod: &Workload, source: IpAddr, now: UnixTime) -> bool {
        sessions.read(token.as_bytes(), now).is_some_and(|session| sessions.belongs(&session, pod, source))
    }

    /// IMDS-6
    #[test]
    fn a_token_is_good_for_its_pod_until_it_expires() {
        let (sessions, pod, source) = parts();
        let token = sessions.issue(Some(&pod), source, 60, NOW);
        assert!(token.bytes().all(|byte| byte.is_ascii_graphic()));
        assert!(token.len() <= 64, "as long as the Common Runtime can take: {}", token.len());
        // Issued at the end of second 0, the token is 59.1 s old at the start of second 60.
        assert!(accepts(&sessions, &token, &pod, source, UnixTime(NOW.0 + 60)), "before its TTL");
        assert!(!accepts(&sessions, &token, &pod, source, UnixTime(NOW.0 + 61)), "expired");
        let other = Workload::sample("b", "uid-b", "sa");
        assert!(!accepts(&sessions, &token, &other, source, NOW), "another pod, with the same address");
        assert!(!accepts(&Sessions::with_key(&[8; KEY_LENGTH]), &token, &pod, source, NOW), "another node");
    }

    #[test]
    fn no_bit_of_a_token_can_be_changed() {
        let (sessions, pod, source) = parts();
        let raw = URL_SAFE_NO_PAD.decode(sessions.issue(Some(&pod), source, 21_600, NOW)).unwrap();
        for bit in 0..raw.len() * 8 {
            let mut changed = raw.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(!accepts(&sessions, &URL_SAFE_NO_PAD.encode(changed), &pod, source, NOW), "bit {bit}");
        }
        for cut in 0..raw.len() {
            assert!(sessions.read(URL_SAFE_NO_PAD.encode(&raw[..cut]).as_bytes(), NOW).is_none());
        }
    }

    #[test]
    fn a_token_from_before_the_pod_was_known_is_good_for_it_and_not_for_the_next_one_with_its_address() {
        let (sessions, pod, source) = parts();
        let token = sessions.issue(None, source, 21_600, NOW);
        assert!(accepts(&sessions, &token, &pod, source, NOW));
        assert!(!accepts(&sessions, &token, &pod, [10, 0, 0, 2].into(), NOW));
        let created = |seconds| Workload::sample_created("b", "uid-b", "sa", UnixTime(NOW.0 + seconds));
        for (seconds, good) in [(0, true), (300, true), (301, false), (3_600, false)] {
            let accepted = accepts(&sessions, &token, &created(seconds), source, UnixTime(NOW.0 + 3_700));
            assert_eq!(accepted, good, "this node's clock is {seconds} s behind, or the pod another one");
        }
    }

    /// IMDS-7
    #[test]
    fn the_key_survives_and_a_damaged_one_is_replaced() {
        let dir = std::env::temp_dir().join(format!("kirsa-session-{}", std::process::id()));
        let (_, pod, source) = parts();
        let token = Sessions::open(&dir).unwrap().issue(Some(&pod), source, 60, NOW);
        assert!(accepts(&Sessions::open(&dir).unwrap(), &token, &pod, source, NOW));
        for damage in [&b"short"[..], &[1; KEY_LENGTH + 1], b""] {
            fs::write(dir.join(KEY_FILE), damage).unwrap();
            let sessions = Sessions::open(&dir).unwrap();
            assert!(!accepts(&sessions, &token, &pod, source, NOW));
            let again = sessions.issue(Some(&pod), source, 60, NOW);
            assert!(accepts(&Sessions::open(&dir).unwrap(), &again, &pod, source, NOW), "the new key was kept");
        }
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&dir.join(KEY_FILE))), (0o700, 0o600));
        fs::remove_dir_all(dir).unwrap();
    }
}
