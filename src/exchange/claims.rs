//! Claims of a token, decoded without verification, for the audit log and for diagnosis. Nothing trusts them: STS
//! verifies the token.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::Deserialize;

use super::credential::Secret;
use crate::clock::UnixTime;

/// Registered claims of a JWT: <https://datatracker.ietf.org/doc/html/rfc7519#section-4.1>.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Claims {
    #[serde(default, rename = "iss")]
    pub issuer: String,
    #[serde(default, rename = "aud")]
    audience: Audience,
    #[serde(default, rename = "exp")]
    pub expires: Option<UnixTime>,
    /// Identifies the token in the API server's audit log.
    #[serde(default)]
    pub jti: Option<String>,
}

/// `aud` is a string or a list; some issuers write a single audience as a string.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Several(Vec<String>),
}

impl Default for Audience {
    fn default() -> Self {
        Self::Several(Vec::new())
    }
}

impl Claims {
    /// Decodes the payload without verifying the signature. Returns `None` if the token is not a JWT.
    pub fn decode_unverified(token: &Secret) -> Option<Self> {
        let payload = URL_SAFE_NO_PAD.decode(token.expose().split('.').nth(1)?).ok()?;
        serde_json::from_slice(&payload).ok()
    }

    pub fn audiences(&self) -> &[String] {
        match &self.audience {
            Audience::One(audience) => std::slice::from_ref(audience),
            Audience::Several(audiences) => audiences,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(json: &str) -> Option<Claims> {
        Claims::decode_unverified(&Secret::new(format!("e30.{}.sig", URL_SAFE_NO_PAD.encode(json))))
    }

    #[test]
    fn audience_is_string_or_list() {
        let full = claims(r#"{"iss":"https://issuer","aud":["a","b"],"exp":7,"jti":"x","sub":"s"}"#).unwrap();
        assert_eq!(
            (full.issuer.as_str(), full.audiences().len(), full.expires),
            ("https://issuer", 2, Some(UnixTime(7)))
        );
        assert_eq!(claims(r#"{"aud":"a"}"#).unwrap().audiences(), ["a"]);
        assert!(claims("{}").unwrap().audiences().is_empty());
        assert!(claims("not json").is_none() && Claims::decode_unverified(&Secret::new("abc".into())).is_none());
    }
}
