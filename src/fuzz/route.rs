//! The path grammar.

use crate::{
    intercept::Service,
    serve::{
        route::Route,
        upstream::{ALLOWABLE, NodeMetadata},
    },
};

pub fn check(data: &[u8]) {
    let Ok(target) = std::str::from_utf8(data) else { return };
    let route = Route::of(Service::Metadata, target);
    let plain = plain(target);
    let segments: Vec<&str> = plain.iter().flatten().map(String::as_str).collect();
    match &route {
        Route::Credentials { role, extended } => {
            let folder = if *extended { "security-credentials-extended" } else { "security-credentials" };
            assert_eq!(segments[1..], ["meta-data", "iam", folder, role], "{target}");
            assert!(role.bytes().all(|byte| byte.is_ascii_graphic() && !b"/%\\;".contains(&byte)), "{target}");
        }
        Route::RoleList => {
            assert_eq!(segments[1..3], ["meta-data", "iam"], "{target}");
            assert!(segments.len() == 4 && segments[3].starts_with("security-credentials"), "{target}");
        }
        Route::Metadata(path) => {
            assert_eq!(*path, segments[1..].join("/"), "{target}");
            // Whatever is asked for: only what is on the list can be found.
            let all = NodeMetadata::new(ALLOWABLE.map(|path| (path.to_owned(), "value".to_owned())));
            assert_eq!(all.value(path).is_some(), ALLOWABLE.contains(&path.as_str()), "{target}");
        }
        Route::IamInfo => assert_eq!(segments[1..], ["meta-data", "iam", "info"], "{target}"),
        Route::Token => assert_eq!(segments[1..], ["api", "token"], "{target}"),
        Route::Versions => assert!(segments.is_empty() && target.starts_with('/'), "{target}"),
        Route::ContainerCredentials => panic!("{target} is of the other service"),
        Route::NotFound => {}
    }
    // In its plainest spelling it is the same.
    if let Some(canonical) = canonical(&route) {
        assert_eq!(Route::of(Service::Metadata, &canonical), route, "{target} as {canonical}");
    }
    let container = Route::of(Service::Container, target);
    assert_eq!(container == Route::ContainerCredentials, segments == ["v1", "credentials"], "{target}");
    assert!([Route::ContainerCredentials, Route::NotFound].contains(&container), "{target}");
}

fn canonical(route: &Route) -> Option<String> {
    let path = match route {
        Route::Versions => "/".into(),
        Route::Token => "/latest/api/token".into(),
        Route::RoleList => "/latest/meta-data/iam/security-credentials".into(),
        Route::IamInfo => "/latest/meta-data/iam/info".into(),
        Route::Credentials { role, extended: false } => format!("/latest/meta-data/iam/security-credentials/{role}"),
        Route::Credentials { role, extended: true } => {
            format!("/latest/meta-data/iam/security-credentials-extended/{role}")
        }
        Route::Metadata(path) => format!("/latest/{path}"),
        Route::ContainerCredentials | Route::NotFound => return None,
    };
    Some(path)
}

/// The segments as a second reader of the grammar has them: split, and decoded once.
fn plain(target: &str) -> Option<Vec<String>> {
    let decoded = |segment: &str| {
        let mut bytes = Vec::new();
        let mut rest = segment.as_bytes();
        while let Some((first, tail)) = rest.split_first() {
            rest = tail;
            bytes.push(match (first, tail) {
                (b'%', [high, low, after @ ..]) => {
                    rest = after;
                    u8::from_str_radix(std::str::from_utf8(&[*high, *low]).ok()?, 16).ok()?
                }
                _ => *first,
            });
        }
        String::from_utf8(bytes).ok()
    };
    target.strip_prefix('/')?.split('/').filter(|segment| !segment.is_empty()).map(decoded).collect()
}
