//! Path → [`Route`]: parsed, normalized and matched exactly. Anything else is not found. Paths are never matched by
//! prefix and never forwarded.

use std::borrow::Cow;

use super::node_metadata::IDENTITY_DOCUMENT;
use crate::intercept::MetadataService;

/// Maximum number of segments; no client requests more.
const MAX_SEGMENTS: usize = 12;

/// A resource that a client can request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route<'a> {
    Versions,
    Token,
    RoleList,
    /// `iam/info`, from which programs read their account.
    IamInfo,
    /// `role` is the requested name, percent-decoded.
    Credentials {
        role: Cow<'a, str>,
        extended: bool,
    },
    /// The identity document, which has the account of the pod's role in place of the node's.
    IdentityDocument,
    /// Any other path below `meta-data` and `dynamic`, to be looked up in the node metadata.
    Metadata(String),
    /// The only path of the container credentials service.
    ContainerCredentials,
    NotFound,
}

impl<'a> Route<'a> {
    /// Returns the metric label.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Versions => "versions",
            Self::Token => "token",
            Self::RoleList => "role_list",
            Self::IamInfo => "iam_info",
            Self::Credentials { .. } => "credentials",
            Self::IdentityDocument | Self::Metadata(_) => "metadata",
            Self::ContainerCredentials => "container_credentials",
            Self::NotFound => "not_found",
        }
    }

    /// Routes a request target, as sent but without its query.
    pub fn of(service: MetadataService, target: &'a str) -> Self {
        match service {
            MetadataService::Metadata => Self::parse(target),
            MetadataService::Container => match decode(target).as_deref().and_then(segments) {
                Some((segments, 2)) if segments[..2] == ["v1", "credentials"] => Self::ContainerCredentials,
                _ => Self::NotFound,
            },
        }
    }

    /// Routes a request target of the metadata service.
    pub fn parse(target: &'a str) -> Self {
        match decode(target) {
            Some(Cow::Borrowed(path)) => Self::match_path(path),
            Some(Cow::Owned(path)) => Route::match_path(&path).into_owned(),
            None => Self::NotFound,
        }
    }

    fn into_owned(self) -> Route<'static> {
        match self {
            Self::Versions => Route::Versions,
            Self::Token => Route::Token,
            Self::RoleList => Route::RoleList,
            Self::IamInfo => Route::IamInfo,
            Self::Credentials { role, extended } => {
                Route::Credentials { role: Cow::Owned(role.into_owned()), extended }
            }
            Self::IdentityDocument => Route::IdentityDocument,
            Self::Metadata(path) => Route::Metadata(path),
            Self::ContainerCredentials => Route::ContainerCredentials,
            Self::NotFound => Route::NotFound,
        }
    }

    fn match_path(path: &'a str) -> Self {
        let Some((segments, count)) = segments(path) else { return Self::NotFound };
        let Some((version, rest)) = segments[..count].split_first() else { return Self::Versions };
        if !is_version(version) {
            return Self::NotFound;
        }
        match rest {
            ["api", "token"] => Self::Token,
            ["meta-data", "iam", "info"] => Self::IamInfo,
            ["meta-data", "iam", "security-credentials" | "security-credentials-extended"] => Self::RoleList,
            ["meta-data", "iam", "security-credentials", role] => {
                Self::Credentials { role: Cow::Borrowed(role), extended: false }
            }
            ["meta-data", "iam", "security-credentials-extended", role] => {
                Self::Credentials { role: Cow::Borrowed(role), extended: true }
            }
            [] | ["meta-data" | "dynamic", ..] => match rest.join("/") {
                path if path == IDENTITY_DOCUMENT => Self::IdentityDocument,
                path => Self::Metadata(path),
            },
            _ => Self::NotFound,
        }
    }
}

/// Accepts `latest`, dates such as `2009-04-04`, and `1.0`.
fn is_version(segment: &str) -> bool {
    let dated = segment.starts_with(|c: char| c.is_ascii_digit())
        && segment.len() <= 16
        && segment.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-' || byte == b'.');
    segment == "latest" || dated
}

/// Splits a path at slashes; repeated and trailing slashes are ignored. Returns `None` for `.` and `..`, and if there
/// are more than [`MAX_SEGMENTS`].
fn segments(path: &str) -> Option<([&str; MAX_SEGMENTS], usize)> {
    let mut segments = [""; MAX_SEGMENTS];
    let mut count = 0;
    for segment in path.split('/').filter(|segment| !segment.is_empty()) {
        let place = segments.get_mut(count).filter(|_| segment != "." && segment != "..")?;
        *place = segment;
        count += 1;
    }
    Some((segments, count))
}

/// Percent-decodes a target once. Returns `None` for what no client sends: bytes other than printable ASCII,
/// backslashes, semicolons, and encoded slashes or percent signs.
fn decode(target: &str) -> Option<Cow<'_, str>> {
    target.strip_prefix('/')?;
    let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'%' | b'\\' | b';');
    if target.bytes().all(plain) {
        return Some(Cow::Borrowed(target));
    }
    let mut bytes = target.bytes();
    let mut decoded = String::with_capacity(target.len());
    while let Some(byte) = bytes.next() {
        let byte = if byte == b'%' {
            let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
            let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
            u8::try_from(high << 4 | low).ok().filter(|byte| *byte != b'/')?
        } else {
            byte
        };
        if !plain(byte) {
            return None;
        }
        decoded.push(char::from(byte));
    }
    Some(Cow::Owned(decoded))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials(role: &str, extended: bool) -> Route<'_> {
        Route::Credentials { role: role.into(), extended }
    }

    fn metadata(path: &str) -> Route<'_> {
        Route::Metadata(path.into())
    }

    /// IMDS-8: paths that real clients send.
    #[test]
    fn client_spellings_are_routed() {
        for (target, route) in [
            ("/", Route::Versions),
            ("/latest", metadata("")),
            ("/latest/meta-data/iam/", metadata("meta-data/iam")),
            ("/latest/meta-data/iam/info", Route::IamInfo),
            ("/latest/meta-data/placement/availability-zone/", metadata("meta-data/placement/availability-zone")),
            ("/latest/dynamic/instance-identity/document/", Route::IdentityDocument),
            ("/latest/api/token", Route::Token),
            ("/2009-04-04/meta-data/iam/security-credentials", Route::RoleList),
            ("/1.0/meta-data/iam/security-credentials/", Route::RoleList),
            ("//latest//meta-data/iam/security-credentials//reader", credentials("reader", false)),
            ("/latest/meta-data/iam/security-credentials/reader/", credentials("reader", false)),
            ("/latest/meta-data/iam/security-credentials/a%2Bb%3Dc%2Cd%40e", credentials("a+b=c,d@e", false)),
            ("/latest/meta-data/iam/security-credentials-extended/", Route::RoleList),
            ("/latest/meta-data/iam/security-credentials-extended/reader", credentials("reader", true)),
        ] {
            assert_eq!(Route::parse(target), route, "{target}");
        }
    }

    /// The node metadata has nothing below `iam`.
    #[test]
    fn other_metadata_needs_its_exact_path() {
        for path in [
            "meta-data/iam/security-credentialsx",
            "meta-data/iam/security-credentials/a/b",
            "meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
        ] {
            assert_eq!(Route::parse(&format!("/latest/{path}")), metadata(path));
        }
    }

    #[test]
    fn services_share_no_paths() {
        for target in ["/v1/credentials", "/v1/credentials/", "//v1//credentials", "/v1/credential%73"] {
            assert_eq!(Route::of(MetadataService::Container, target), Route::ContainerCredentials, "{target}");
            assert_eq!(Route::of(MetadataService::Metadata, target), Route::NotFound, "{target}");
        }
        for target in [
            "/",
            "/v1",
            "/v2/credentials",
            "/v1/credentials/x",
            "/v1%2fcredentials",
            "/V1/credentials",
            "/v1/../v1/credentials",
            "/latest/api/token",
            "/latest/meta-data/iam/security-credentials/",
        ] {
            assert_eq!(Route::of(MetadataService::Container, target), Route::NotFound, "{target}");
        }
    }

    /// IMDS-33
    #[test]
    fn other_paths_are_not_found() {
        for target in [
            "",
            "*",
            "latest/api/token",
            "/Latest/api/token",
            "/latest/API/token",
            "/latest/api/token/x",
            "/latest/api",
            "/x/meta-data/iam/security-credentials",
            "/latest/meta-data/iam/security-credentials/a%2fb",
            "/latest/meta-data/iam/security-credentials/%252f",
            "/latest/meta-data/iam/security-credentials/a%00",
            "/latest/meta-data/iam/security-credentials/a%0a",
            "/latest/meta-data/iam/security-credentials/a;b",
            "/latest/meta-data/iam/security-credentials/a%",
            "/latest/meta-data/iam/security-credentials/a%+1",
            "/latest/meta-data/iam/security-credentials/\\a",
            "/latest/meta-data/./iam/security-credentials/a",
            "/latest/meta-data/x/../iam/security-credentials/a",
            "/latest/meta-data/%2e%2e/iam/security-credentials/a",
            "/latest/user-data",
            "/999999999999999999999/meta-data/iam/security-credentials",
        ] {
            assert_eq!(Route::parse(target), Route::NotFound, "{target}");
        }
    }
}
