//! IMDS tokens (EC2 calls them session tokens of IMDSv2). A token is stateless: an HMAC over the pod and the expiry. It
//! survives restarts of the agent and is useless to another pod. SDKs cache a token for up to six hours, and some never
//! request a new one after a 401, so an issued token must stay valid.
//!
//! A client may request a token before its pod is known, and must not wait for that. Such a token is bound to the
//! source address instead, and to pods that existed when it was issued.
//!
//! The AWS Common Runtime has a 64-byte buffer for tokens and fails with longer ones; those of EC2 have 56 bytes.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    net::IpAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
    time::Duration,
};

use aws_lc_rs::{
    hmac,
    rand::{SecureRandom, SystemRandom},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use tracing::{info, warn};
use zeroize::Zeroizing;

use crate::{attribute::Workload, clock::UnixTime};

/// TTLs that IMDSv2 allows, in seconds
/// (<https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html>).
pub const TTL: std::ops::RangeInclusive<u32> = 1..=21_600;

/// Length of the key in bytes.
pub const KEY_LENGTH: usize = 32;
/// Name of the key file in the state directory.
pub const KEY_FILE: &str = "session-token.key";
const MAC_LENGTH: usize = 32;
/// Unix time in 40 bits, which is enough for 34,000 years.
const TIME_LENGTH: usize = 5;
/// Clock skew tolerated between this node, which dates tokens, and the API server, which dates pods. As much as AWS
/// tolerates: an SDK whose token is refused for its whole lifetime may never request another.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(300);

/// The identity that a token is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Binding {
    Pod = 1,
    Address = 2,
}

/// Issues and verifies IMDS tokens.
pub struct ImdsTokens {
    key: hmac::Key,
}

impl std::fmt::Debug for ImdsTokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ImdsTokens")
    }
}

/// A well-formed token that has not expired. An address-bound one is authentic; a pod-bound one is verified when the
/// pod is known.
#[derive(Debug)]
pub struct ImdsToken {
    binding: Binding,
    issued: UnixTime,
    expires: UnixTime,
    mac: [u8; MAC_LENGTH],
}

impl ImdsToken {
    /// Returns whether the token is bound to a pod, rather than to an address.
    pub fn is_bound_to_pod(&self) -> bool {
        self.binding == Binding::Pod
    }
}

impl ImdsTokens {
    /// Reads the key from the state directory. A missing or damaged key is replaced.
    ///
    /// # Errors
    /// The random number generator failed.
    pub fn open(state_dir: &Path) -> anyhow::Result<Self> {
        match read_key(state_dir) {
            Ok(Some(key)) => return Ok(Self::with_key(&key)),
            Ok(None) => {
                info!(dir = %state_dir.display(), "the state directory has no key for IMDS tokens: generating one")
            }
            Err(error) => warn!(
                dir = %state_dir.display(), %error,
                "cannot read the key for IMDS tokens: generating a new one; SDKs must request new tokens"
            ),
        }
        let mut key = Zeroizing::new([0; KEY_LENGTH]);
        SystemRandom::new().fill(&mut *key).map_err(|_| anyhow::anyhow!("the random number generator failed"))?;
        if let Err(error) = write_key(state_dir, &*key) {
            warn!(
                dir = %state_dir.display(), %error,
                "cannot save the key for IMDS tokens (--state-dir): tokens will not survive a restart of the agent"
            );
        }
        Ok(Self::with_key(&key))
    }

    pub(crate) fn with_key(key: &[u8; KEY_LENGTH]) -> Self {
        Self { key: hmac::Key::new(hmac::HMAC_SHA256, key) }
    }

    /// Issues a token that is bound to the pod if it is known, and to the address otherwise.
    pub fn issue(&self, workload: Option<&Workload>, source: IpAddr, ttl: u32, now: UnixTime) -> String {
        let binding = if workload.is_some() { Binding::Pod } else { Binding::Address };
        let expires = UnixTime(now.0 + u64::from(ttl));
        let source = source.to_string();
        let bound_to = workload.map_or(source.as_bytes(), |workload| workload.uid().0.as_bytes());
        let mac = hmac::sign(&self.key, &message(binding, now, expires, bound_to));
        let mut token = vec![binding as u8];
        token.extend(encode_time(now));
        token.extend(encode_time(expires));
        token.extend(mac.as_ref());
        URL_SAFE_NO_PAD.encode(token)
    }

    /// Parses a token. Returns `None` if it is malformed, has expired, or is bound to another address than `source`.
    pub fn parse(&self, token: &[u8], source: IpAddr, now: UnixTime) -> Option<ImdsToken> {
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (binding, rest) = bytes.split_first()?;
        let (issued, rest) = rest.split_first_chunk()?;
        let (expires, mac) = rest.split_first_chunk()?;
        let token = ImdsToken {
            binding: match binding {
                1 => Binding::Pod,
                2 => Binding::Address,
                _ => return None,
            },
            issued: decode_time(*issued),
            expires: decode_time(*expires),
            mac: mac.try_into().ok()?,
        };
        // Both times are truncated to whole seconds: the TTL has certainly passed only one second later.
        (now <= token.expires && (token.is_bound_to_pod() || self.is_authentic(&token, source.to_string().as_bytes())))
            .then_some(token)
    }

    /// Returns whether the token was issued to this pod, or to its address after the pod was created.
    pub fn verify(&self, token: &ImdsToken, workload: &Workload) -> bool {
        match token.binding {
            Binding::Pod => self.is_authentic(token, workload.uid().0.as_bytes()),
            Binding::Address => workload.created().0 <= token.issued.0 + CLOCK_TOLERANCE.as_secs(),
        }
    }

    /// Verifies the MAC in constant time.
    fn is_authentic(&self, token: &ImdsToken, bound_to: &[u8]) -> bool {
        let message = message(token.binding, token.issued, token.expires, bound_to);
        hmac::verify(&self.key, &message, &token.mac).is_ok()
    }
}

fn encode_time(time: UnixTime) -> [u8; TIME_LENGTH] {
    let [_, _, _, bytes @ ..] = time.0.to_be_bytes();
    bytes
}

fn decode_time(bytes: [u8; TIME_LENGTH]) -> UnixTime {
    UnixTime(bytes.iter().fold(0, |seconds, byte| seconds << 8 | u64::from(*byte)))
}

/// Returns the bytes that the MAC covers. Changing them invalidates all tokens that were issued before.
fn message(binding: Binding, issued: UnixTime, expires: UnixTime, bound_to: &[u8]) -> Vec<u8> {
    let mut message = b"kirsa session token 1\0".to_vec();
    message.push(binding as u8);
    message.extend(issued.0.to_be_bytes());
    message.extend(expires.0.to_be_bytes());
    message.extend(bound_to);
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
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is longer than a key"));
    }
    Ok(Some(key))
}

/// Writes a temporary file and renames it, so that a crash leaves the old key or the new one, never a partial one.
fn write_key(state_dir: &Path, key: &[u8]) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir)?;
    let (temporary, path) = (state_dir.join(format!("{KEY_FILE}.new")), state_dir.join(KEY_FILE));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(key)?;
    file.sync_all()?;
    fs::rename(temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixTime = UnixTime(1_700_000_000);

    fn parts() -> (ImdsTokens, Workload, IpAddr) {
        (ImdsTokens::with_key(&[7; KEY_LENGTH]), Workload::sample("a", "uid-a", "sa"), [10, 0, 0, 1].into())
    }

    fn accepts(tokens: &ImdsTokens, token: &str, pod: &Workload, source: IpAddr, now: UnixTime) -> bool {
        tokens.parse(token.as_bytes(), source, now).is_some_and(|token| tokens.verify(&token, pod))
    }

    /// IMDS-6
    #[test]
    fn token_is_valid_for_its_pod_until_expiry() {
        let (tokens, pod, source) = parts();
        let token = tokens.issue(Some(&pod), source, 60, NOW);
        assert!(token.bytes().all(|byte| byte.is_ascii_graphic()));
        assert!(token.len() <= 64, "longer than the Common Runtime accepts: {}", token.len());
        // Issued at the end of second 0, the token is 59.1 s old at the start of second 60.
        assert!(accepts(&tokens, &token, &pod, source, UnixTime(NOW.0 + 60)), "before its TTL");
        assert!(!accepts(&tokens, &token, &pod, source, UnixTime(NOW.0 + 61)), "expired");
        let other = Workload::sample("b", "uid-b", "sa");
        assert!(!accepts(&tokens, &token, &other, source, NOW), "another pod, with the same address");
        assert!(!accepts(&ImdsTokens::with_key(&[8; KEY_LENGTH]), &token, &pod, source, NOW), "another node");
    }

    #[test]
    fn no_bit_of_a_token_can_be_changed() {
        let (tokens, pod, source) = parts();
        let raw = URL_SAFE_NO_PAD.decode(tokens.issue(Some(&pod), source, 21_600, NOW)).unwrap();
        for bit in 0..raw.len() * 8 {
            let mut changed = raw.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(!accepts(&tokens, &URL_SAFE_NO_PAD.encode(changed), &pod, source, NOW), "bit {bit}");
        }
        for cut in 0..raw.len() {
            assert!(tokens.parse(URL_SAFE_NO_PAD.encode(&raw[..cut]).as_bytes(), source, NOW).is_none());
        }
    }

    #[test]
    fn address_bound_token_serves_no_newer_pod() {
        let (tokens, pod, source) = parts();
        let token = tokens.issue(None, source, 21_600, NOW);
        assert!(accepts(&tokens, &token, &pod, source, NOW));
        assert!(!accepts(&tokens, &token, &pod, [10, 0, 0, 2].into(), NOW));
        let created = |seconds| Workload::sample_created("b", "uid-b", "sa", UnixTime(NOW.0 + seconds));
        for (seconds, valid) in [(0, true), (300, true), (301, false), (3_600, false)] {
            let accepted = accepts(&tokens, &token, &created(seconds), source, UnixTime(NOW.0 + 3_700));
            assert_eq!(accepted, valid, "created {seconds} s after the token was issued");
        }
    }

    /// IMDS-7
    #[test]
    fn key_survives_and_a_damaged_one_is_replaced() {
        let dir = std::env::temp_dir().join(format!("kirsa-imds-token-{}", std::process::id()));
        let (_, pod, source) = parts();
        let token = ImdsTokens::open(&dir).unwrap().issue(Some(&pod), source, 60, NOW);
        assert!(accepts(&ImdsTokens::open(&dir).unwrap(), &token, &pod, source, NOW));
        for damage in [&b"short"[..], &[1; KEY_LENGTH + 1], b""] {
            fs::write(dir.join(KEY_FILE), damage).unwrap();
            let tokens = ImdsTokens::open(&dir).unwrap();
            assert!(!accepts(&tokens, &token, &pod, source, NOW));
            let again = tokens.issue(Some(&pod), source, 60, NOW);
            assert!(accepts(&ImdsTokens::open(&dir).unwrap(), &again, &pod, source, NOW), "the new key was saved");
        }
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&dir.join(KEY_FILE))), (0o700, 0o600));
        fs::remove_dir_all(dir).unwrap();
    }
}
