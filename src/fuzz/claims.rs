//! What a token says of itself.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

use crate::exchange::{claims::Claims, credential::Secret};

pub fn check(data: &[u8]) {
    // Once as a token, once as the payload of one, which is where all but the framing is.
    let payload = format!("eyJhbGciOiJub25lIn0.{}.c2lnbmF0dXJl", URL_SAFE_NO_PAD.encode(data));
    for token in [String::from_utf8_lossy(data).into_owned(), payload] {
        let secret = Secret::new(token.clone());
        assert!(!format!("{secret:?}").contains(&token) || token.is_empty() || "[redacted]".contains(&token));
        let Some(claims) = Claims::decode_unverified(&secret) else { continue };
        // Read of a JSON object in the second part, and of nothing else.
        let second = URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap();
        // A member that is skipped may be text that is none, which a whole reading does not bear.
        let read: serde_json::Value = serde_json::from_slice(&second).unwrap_or_default();
        if let Some(members) = read.as_object() {
            assert_eq!(claims.issuer, members.get("iss").and_then(|iss| iss.as_str()).unwrap_or_default());
            assert_eq!(claims.expires.map(|time| time.0), members.get("exp").and_then(serde_json::Value::as_u64));
        }
        assert!(!format!("{claims:?}").contains("c2lnbmF0dXJl") || second.windows(12).any(|w| w == b"c2lnbmF0dXJl"));
    }
}
