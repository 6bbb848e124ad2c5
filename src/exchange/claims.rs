//! What a token says of itself, read without checking it: for the log and for whoever looks for what is wrong. Trusted
//! for nothing; STS is who decides.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::Deserialize;

use super::credential::Secret;

/// The claims that tell tokens apart (RFC 7519, section 4.1).
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Claims {
    #[serde(default, rename = "iss")]
    pub issuer: String,
    #[serde(default, rename = "aud")]
    audience: Audience,
    /// Seconds since the epoch.
    #[serde(default, rename = "exp")]
    pub expires: Option<u64>,
    /// What the API server's audit log calls the token.
    #[serde(default, rename = "jti")]
    pub id: Option<String>,
}

/// One string where there is one, by some issuers.
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
    /// `None` for what is no JWT.
    pub fn of(token: &Secret) -> Option<Self> {
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
        Claims::of(&Secret::new(format!("e30.{}.sig", URL_SAFE_NO_PAD.encode(json))))
    }

    #[test]
    fn claims_are_read_in_every_form() {
        let full = claims(r#"{"iss":"https://issuer","aud":["a","b"],"exp":7,"jti":"x","sub":"s"}"#).unwrap();
        assert_eq!((full.issuer.as_str(), full.audiences().len(), full.expires), ("https://issuer", 2, Some(7)));
        assert_eq!(claims(r#"{"aud":"a"}"#).unwrap().audiences(), ["a"]);
        assert!(claims("{}").unwrap().audiences().is_empty());
        assert!(claims("no json").is_none() && Claims::of(&Secret::new("abc".into())).is_none());
    }
}
