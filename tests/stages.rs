//! What the tree itself shows. The order of the pipeline: a stage names the stages before it and the shared modules,
//! never those after it. And that each requirement on the surface has a test.

use std::{collections::BTreeSet, fs, path::Path};

/// From left to right, as in ARCHITECTURE.md.
const STAGES: [&str; 6] = ["intercept", "attribute", "authorize", "exchange", "cache", "serve"];
/// May be named by every stage, and name none.
const SHARED: [&str; 4] = ["clock", "connections", "observe", "refusal"];
/// May name the way to the API server, which knows no stage.
const ASK_KUBERNETES: [&str; 2] = ["attribute", "authorize"];
/// Sees every stage.
const WIRING: [&str; 4] = ["agent", "config", "doctor", "fuzz"];

#[test]
fn a_stage_names_only_what_stands_before_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut seen = 0;
    for (room, text) in files(&src, None) {
        let mut allowed: Vec<&str> = match STAGES.iter().position(|stage| *stage == room) {
            Some(place) => SHARED.iter().chain(&STAGES[..=place]).copied().collect(),
            None if WIRING.contains(&room.as_str()) || room == "lib" || room == "main" => continue,
            None => SHARED.to_vec(),
        };
        if ASK_KUBERNETES.contains(&room.as_str()) {
            allowed.push("kubernetes");
        }
        for named in named(&text) {
            seen += 1;
            assert!(allowed.contains(&named.as_str()), "{room} names crate::{named}; it may name only {allowed:?}");
        }
    }
    assert!(seen > 12, "the search finds the names at all: {seen}");
}

/// What each part may know of the world, by the crates that it names.
#[test]
fn each_stage_knows_only_its_own_part_of_the_world() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let forbidden = |room: &str| -> &[&str] {
        match room {
            "intercept" => &["kube::", "k8s_openapi", "hyper", "aws_sdk_sts"],
            "attribute" => &["hyper", "aws_sdk_sts"],
            "authorize" => &["hyper", "aws_sdk_sts"],
            "exchange" => &["hyper::", "hyper_util"],
            "cache" => &["kube::", "k8s_openapi", "hyper", "aws_"],
            "serve" => &["kube::", "k8s_openapi", "aws_sdk_sts"],
            _ => &[],
        }
    };
    for (room, text) in files(&src, None) {
        let code: String = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        for name in forbidden(&room) {
            assert!(!code.contains(name), "{room} names {name}");
        }
    }
}

/// So that whoever changes a requirement finds its tests, and whoever changes a test what it is for.
#[test]
fn every_requirement_is_cited_by_a_black_box_test_and_no_number_is_made_up() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/imds-requirements.md")).unwrap();
    let numbers: BTreeSet<u32> = page.lines().filter_map(|line| line.split_once(". ")?.0.parse().ok()).collect();
    assert_eq!(numbers, (1..=33).collect());
    assert_eq!(cited(&root.join("tests")), numbers);
    assert!(cited(&root.join("src")).is_subset(&numbers));
}

/// The numbers of requirements in the comments of all source files there.
fn cited(folder: &Path) -> BTreeSet<u32> {
    let mut numbers = BTreeSet::new();
    for (_, text) in files(folder, None) {
        for comment in text.lines().filter(|line| line.trim_start().starts_with("//")) {
            let behind = comment.split("IMDS-").skip(1);
            numbers.extend(
                behind.filter_map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u32>().ok()),
            );
        }
    }
    numbers
}

/// Every source file with its room: the first part of its path.
fn files(folder: &Path, room: Option<&str>) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let room = room.unwrap_or(stem);
        if path.is_dir() {
            found.extend(files(&path, Some(room)));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push((room.to_owned(), fs::read_to_string(&path).unwrap()));
        }
    }
    found
}

/// The modules after `crate::`, in `use` lines, groups and paths alike.
fn named(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        // Not part of a longer name, and not of a comment.
        let line_start = text[..at].rfind('\n').map_or(0, |newline| newline + 1);
        if text[line_start..at].trim_start().starts_with("//") || text[..at].ends_with(|c: char| c.is_alphanumeric()) {
            continue;
        }
        let rest = &text[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 1;
            let mut name = String::new();
            for c in group.chars() {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    _ => {}
                }
                if depth == 1 && (c.is_alphanumeric() || c == '_') {
                    name.push(c);
                } else if !name.is_empty() {
                    // Only what starts an item of the group, not what follows a `::` in it.
                    names.push(std::mem::take(&mut name));
                }
                if depth == 0 {
                    break;
                }
            }
        } else {
            names.push(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
        }
    }
    names.retain(|name| STAGES.contains(&name.as_str()) || WIRING.contains(&name.as_str()) || name == "kubernetes");
    names
}
