//! Properties of the source tree: a stage names only the stages before it and the shared modules, each requirement on
//! the surface has a test, and names use the field's terms.

use std::{collections::BTreeSet, fs, path::Path};

use proc_macro2::{TokenStream, TokenTree};

/// From left to right, as in ARCHITECTURE.md.
const STAGES: [&str; 6] = ["intercept", "attribute", "authorize", "exchange", "cache", "serve"];
/// Every stage may name these; they name no stage.
const SHARED: [&str; 4] = ["clock", "connections", "observe", "refusal"];
/// These may name the API-server client, which knows no stage.
const ASK_KUBERNETES: [&str; 2] = ["attribute", "authorize"];
/// These see every stage.
const WIRING: [&str; 4] = ["agent", "config", "doctor", "fuzz"];
/// Old names of things that have a term now; ARCHITECTURE.md has the glossary. One in CamelCase bans the type only.
const OLD_WORDS: [&str; 16] = [
    "foresee",
    "stand_in",
    "knock",
    "told",
    "doubt",
    "doubted",
    "in_hand",
    "last_resort",
    "hurry",
    "peek",
    "edition",
    "keeper",
    "turned_away",
    "Arrival",
    "Knock",
    "Urgency",
];

#[test]
fn stage_names_only_earlier_stages() {
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

/// A stage must not name the crates of other stages.
#[test]
fn stage_names_only_its_own_crates() {
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

/// The citations lead from a requirement to its tests, and back.
#[test]
fn every_requirement_is_cited_by_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/imds-requirements.md")).unwrap();
    let numbers: BTreeSet<u32> = page.lines().filter_map(|line| line.split_once(". ")?.0.parse().ok()).collect();
    assert_eq!(numbers, (1..=33).collect());
    assert_eq!(cited(&root.join("tests")), numbers);
    assert!(cited(&root.join("src")).is_subset(&numbers));
}

#[test]
fn old_words_are_no_identifiers() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut seen, mut old) = (0, BTreeSet::new());
    for (room, text) in files(&src, None) {
        for identifier in identifiers(&text) {
            seen += 1;
            if OLD_WORDS.iter().any(|word| is_named_after(&identifier, word)) {
                old.insert(format!("{identifier} ({room})"));
            }
        }
    }
    assert!(old.is_empty(), "rename {old:#?}; ARCHITECTURE.md has the terms");
    assert!(seen > 10_000, "the search finds the identifiers: {seen}");
}

#[test]
fn old_words_are_found() {
    let found = |text: &str| identifiers(text).iter().any(|name| OLD_WORDS.iter().any(|w| is_named_after(name, w)));
    for text in
        ["fn told() {}", "let is_told = 1;", "struct TurnedAway;", "x: Arrival,", "DOUBTED", "let c = 'x'; knock"]
    {
        assert!(found(text), "{text}");
    }
    for text in
        ["// told", "\"told\"", "self.outcome.peek()", "arrival: u64", "fn stand_in_the_way_of_it() {}", "untold"]
    {
        assert!(!found(text), "{text}");
    }
}

/// Whether an identifier is the word or has it as a part. Names of more than three words are sentences of tests.
fn is_named_after(identifier: &str, word: &str) -> bool {
    if word.starts_with(char::is_uppercase) {
        return identifier == word;
    }
    let mut snake = String::new();
    for c in identifier.chars() {
        if c.is_uppercase() && snake.ends_with(char::is_lowercase) {
            snake.push('_');
        }
        snake.push(c);
    }
    let snake = snake.to_lowercase();
    snake == word || snake.matches('_').count() < 3 && format!("_{snake}_").contains(&format!("_{word}_"))
}

/// Returns the identifiers of a source file, without members after a dot, which may belong to another crate.
fn identifiers(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    collect_identifiers(text.parse().unwrap(), &mut names);
    names
}

fn collect_identifiers(tokens: TokenStream, names: &mut Vec<String>) {
    let mut after_dot = false;
    for token in tokens {
        let is_dot = matches!(&token, TokenTree::Punct(punct) if punct.as_char() == '.');
        match token {
            TokenTree::Group(group) => collect_identifiers(group.stream(), names),
            TokenTree::Ident(name) if !after_dot => names.push(name.to_string()),
            _ => {}
        }
        after_dot = is_dot;
    }
}

/// Returns the numbers of requirements in the comments of all source files of a folder.
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

/// Returns every source file with its room, the first part of its path.
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

/// Returns the modules after `crate::`, in `use` lines, groups and paths alike.
fn named(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        // Skips parts of longer names, and comments.
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
                    // Takes the first part of each item of the group, not what follows a `::` in it.
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
