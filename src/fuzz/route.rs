//! The path grammar.

use crate::serve::{
    route::Route,
    upstream::{ALLOWABLE, NodeMetadata},
};

pub fn check(data: &[u8]) {
    let Ok(target) = std::str::from_utf8(data) else { return };
    let route = Route::parse(target);
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
        Route::NotFound => return,
    }
    // In its plainest spelling it is the same.
    let canonical = canonical(&route);
    let again = Route::parse(&canonical);
    let same_list = matches!((&route, &again), (Route::RoleList, Route::RoleList));
    assert!(again == route || same_list, "{target} as {canonical}");
}

fn canonical(route: &Route) -> String {
    match route {
        Route::Versions => "/".into(),
        Route::Token => "/latest/api/token".into(),
        Route::RoleList => "/latest/meta-data/iam/security-credentials".into(),
        Route::IamInfo => "/latest/meta-data/iam/info".into(),
        Route::Credentials { role, extended: false } => {
            format!("/latest/meta-data/iam/security-credentials/{role}")
        }
        Route::Credentials { role, extended: true } => {
            format!("/latest/meta-data/iam/security-credentials-extended/{role}")
        }
        Route::Metadata(path) => format!("/latest/{path}"),
        Route::NotFound => String::new(),
    }
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
    target.split('/').filter(|segment| !segment.is_empty()).map(decoded).collect()
}
