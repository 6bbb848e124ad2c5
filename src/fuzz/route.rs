//! The router, compared with an independent second implementation.

use crate::{
    intercept::MetadataService,
    serve::{
        node_metadata::{ALLOWABLE, NodeMetadata, groups::Allowed},
        route::Route,
    },
};

/// Some paths that groups open.
const GROUP_PATHS: [&str; 4] = [
    "meta-data/events/maintenance/scheduled",
    "meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/vpc-id",
    "meta-data/spot/instance-action",
    "meta-data/tags/instance/aws:autoscaling:groupName",
];

pub fn check(data: &[u8]) {
    let Ok(target) = std::str::from_utf8(data) else { return };
    let route = Route::of(MetadataService::Metadata, target);
    let segments = segments(target);
    assert_eq!(route, expected(segments.as_deref()), "{target}");
    if let Route::Metadata(path) = &route {
        // The node has every allowed path. Its own role, its user data and its signatures must not be among them.
        let paths = ALLOWABLE.iter().chain(&GROUP_PATHS).map(|path| ((*path).to_owned(), "value".to_owned()));
        let all = NodeMetadata::new(paths, Allowed::default());
        let forbidden = ["iam", "identity-credentials", "user-data", "public-keys", "pkcs7", "signature", "rsa2048"];
        let known = all.value(path).is_some() || !all.entries(path).is_empty();
        assert!(!known || !forbidden.iter().any(|word| path.contains(word)), "{target}");
    }
    let container = Route::of(MetadataService::Container, target);
    let is_credentials = segments.is_some_and(|segments| segments == ["v1", "credentials"]);
    assert_eq!(container, if is_credentials { Route::ContainerCredentials } else { Route::NotFound }, "{target}");
}

fn expected(segments: Option<&[String]>) -> Route<'static> {
    let Some(segments) = segments.filter(|segments| segments.len() <= 12) else { return Route::NotFound };
    let Some((version, rest)) = segments.split_first() else { return Route::Versions };
    let digits_first = version.as_bytes()[0].is_ascii_digit() && version.len() <= 16;
    let is_version = digits_first && version.trim_matches(|c: char| "0123456789.-".contains(c)).is_empty();
    if version != "latest" && !is_version {
        return Route::NotFound;
    }
    let path = rest.join("/");
    let name_in = |folder: &str| rest.last().filter(|_| rest.len() == 4 && rest[..3].join("/") == folder).cloned();
    if let Some(role) = name_in("meta-data/iam/security-credentials") {
        return Route::Credentials { role: role.into(), extended: false };
    }
    if let Some(role) = name_in("meta-data/iam/security-credentials-extended") {
        return Route::Credentials { role: role.into(), extended: true };
    }
    match path.as_str() {
        "api/token" => Route::Token,
        "meta-data/iam/info" => Route::IamInfo,
        "meta-data/iam/security-credentials" | "meta-data/iam/security-credentials-extended" => Route::RoleList,
        "dynamic/instance-identity/document" => Route::IdentityDocument,
        _ if path.is_empty() || ["meta-data", "dynamic"].contains(&rest[0].as_str()) => Route::Metadata(path),
        _ => Route::NotFound,
    }
}

/// Splits a path at slashes, and then decodes each segment once. Returns `None` if it has anything that no client
/// sends.
pub(super) fn segments(target: &str) -> Option<Vec<String>> {
    let mut segments = Vec::new();
    for segment in target.strip_prefix('/')?.split('/').filter(|segment| !segment.is_empty()) {
        let mut parts = segment.split('%');
        let mut decoded = parts.next()?.to_owned();
        for part in parts {
            let (digits, rest) = part.split_at_checked(2)?;
            let byte = digits.bytes().all(|digit| digit.is_ascii_hexdigit()).then(|| u8::from_str_radix(digits, 16))?;
            decoded.push(char::from(byte.ok().filter(|byte| !b"/%".contains(byte))?));
            decoded.push_str(rest);
        }
        if decoded == "." || decoded == ".." || !decoded.chars().all(|c| c.is_ascii_graphic() && !"\\;".contains(c)) {
            return None;
        }
        segments.push(decoded);
    }
    Some(segments)
}
