//! Claims of a JWT.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

use crate::exchange::{claims::Claims, credential::Secret};

pub fn check(data: &[u8]) {
    // The data as a token, and as the payload of a well-framed one.
    let payload = format!("eyJhbGciOiJub25lIn0.{}.c2lnbmF0dXJl", URL_SAFE_NO_PAD.encode(data));
    for token in [String::from_utf8_lossy(data).into_owned(), payload] {
        let secret = Secret::new(token.clone());
        assert!(!format!("{secret:?}").contains(&token) || token.is_empty() || "[redacted]".contains(&token));
        let Some(claims) = Claims::decode_unverified(&secret) else { continue };
        // Claims come only from a JSON object in the second part.
        let second = URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap();
        // A full parse may fail where skipped members hold invalid text.
        let read: serde_json::Value = serde_json::from_slice(&second).unwrap_or_default();
        if let Some(members) = read.as_object() {
            assert_eq!(claims.issuer, members.get("iss").and_then(|iss| iss.as_str()).unwrap_or_default());
            assert_eq!(claims.expires.map(|time| time.0), members.get("exp").and_then(serde_json::Value::as_u64));
        }
        assert!(!format!("{claims:?}").contains("c2lnbmF0dXJl") || second.windows(12).any(|w| w == b"c2lnbmF0dXJl"));
    }
}
