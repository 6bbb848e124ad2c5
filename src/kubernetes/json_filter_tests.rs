use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const KEPT: &str = "kept/role-arn";

fn keep() -> AnnotationFilter {
    Arc::new(|name| (name == KEPT).then_some(64))
}

/// Returns the filter's output for a document that arrives in chunks of that size.
fn filtered(document: &[u8], chunk: usize) -> Result<Vec<u8>, InvalidJson> {
    let (mut filter, mut out) = (JsonFilter::new(keep()), Vec::new());
    document.chunks(chunk.max(1)).try_for_each(|bytes| filter.push(bytes, &mut out))?;
    Ok(out)
}

/// Returns the expected output, computed by serde_json from the whole document.
fn expected(value: &Value, position: Position) -> Value {
    match (value, position) {
        (Value::Object(_) | Value::Array(_), Position::Value(_)) => json!({}),
        (Value::Object(members), _) => members
            .iter()
            .map(|(name, value)| (name, value, position.member(name, &keep())))
            .filter(|(.., position)| *position != Position::Skipped)
            .map(|(name, value, position)| (name.clone(), expected(value, position)))
            .collect(),
        (Value::Array(_), _) if position.element() == Position::Skipped => json!([]),
        (Value::Array(values), _) => values.iter().map(|value| expected(value, position.element())).collect(),
        (Value::String(text), _) => {
            let max = position.max_len();
            if text.len() <= max { value.clone() } else { "x".repeat(max + 1).into() }
        }
        _ => value.clone(),
    }
}

fn names() -> impl Strategy<Value = String> {
    const KNOWN: [&str; 14] = [
        "metadata",
        "annotations",
        "items",
        "object",
        "spec",
        "status",
        "podIPs",
        "ip",
        "name",
        "type",
        "managedFields",
        KEPT,
        LIST_END,
        "serviceAccountName",
    ];
    prop_oneof![4 => proptest::sample::select(&KNOWN[..]).prop_map(str::to_owned), 1 => any::<String>()]
}

fn documents() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        "[a<\"\\\\\u{1}é]{60,70}".prop_map(Value::from),
    ];
    let nested = leaf.prop_recursive(6, 64, 6, |inner| {
        prop_oneof![
            2 => proptest::collection::btree_map(names(), inner.clone(), 0..6)
                .prop_map(|members| members.into_iter().collect::<Value>()),
            1 => proptest::collection::vec(inner, 0..4).prop_map(Value::from),
        ]
    });
    proptest::collection::btree_map(names(), nested, 0..6).prop_map(|members| members.into_iter().collect())
}

proptest! {
    #[test]
    fn agrees_with_serde_json(document in documents(), chunk in 1_usize..40, pretty: bool) {
        let text = if pretty { serde_json::to_vec_pretty(&document) } else { serde_json::to_vec(&document) }.unwrap();
        let read: Value = serde_json::from_slice(&filtered(&text, chunk).unwrap()).unwrap();
        prop_assert_eq!(read, expected(&document, Position::Object));
    }

    /// A truncated list is an error.
    #[test]
    fn truncated_documents_fail(document in documents(), cut in 1_usize..64) {
        let text = serde_json::to_vec(&document).unwrap();
        let text = &text[..text.len().saturating_sub(cut)];
        if let Ok(out) = filtered(text, 7) {
            prop_assert!(serde_json::from_slice::<Value>(&out).is_err());
        }
    }

    /// The filter accepts whatever serde_json accepts.
    #[test]
    fn damaged_documents_agree_with_serde_json(document in documents(), at: proptest::sample::Index, byte in b' '..127) {
        let mut text = serde_json::to_vec(&document).unwrap();
        let at = at.index(text.len());
        text[at] = byte;
        let filtered = filtered(&text, 5);
        if let Ok(value) = serde_json::from_slice::<Value>(&text) {
            let read: Value = serde_json::from_slice(&filtered.unwrap()).unwrap();
            prop_assert_eq!(read, expected(&value, Position::Object));
        }
    }
}

#[test]
fn unread_annotations_are_not_buffered() {
    let (mut filter, mut out) = (JsonFilter::new(keep()), Vec::new());
    filter.push(br#"{"items":["#, &mut out).unwrap();
    let annotations: Vec<_> = (0..52_000).map(|number| format!(r#""{number:04x}":"""#)).collect();
    for number in 0..40 {
        let comma = if number > 0 { "," } else { "" };
        let item = format!(
            r#"{comma}{{"metadata":{{"name":"a","annotations":{{{}}},"managedFields":[{{"x":"{}"}}]}}}}"#,
            annotations.join(","),
            "y".repeat(1 << 20)
        );
        for bytes in item.as_bytes().chunks(16 << 10) {
            filter.push(bytes, &mut out).unwrap();
        }
    }
    filter.push(b"]}", &mut out).unwrap();
    assert!(filter.token.capacity() <= 2 * MAX_NAME_LEN && out.capacity() < 16 << 10, "{}", out.capacity());
    let read: Value = serde_json::from_slice(&out).unwrap();
    assert_eq!(read["items"].as_array().unwrap().len(), 40);
}

#[test]
fn watch_events_stay_lines() {
    let event = r#"{"type":"ADDED","object":{"metadata":{"name":"a","labels":{"a":"b"}}}}"#;
    let out = filtered(format!("{event}\n{event}\n").as_bytes(), 9).unwrap();
    let reduced = r#"{"type":"ADDED","object":{"metadata":{"name":"a"}}}"#;
    assert_eq!(String::from_utf8(out).unwrap(), format!("{reduced}\n{reduced}\n"));
}

#[test]
fn malformed_json_is_rejected() {
    for malformed in [r#"{"a":[}"#, r#"{"a" 1}"#, r#"{"a":tru}"#, r#"{"a":1,}"#, "[1,]", "{\"a\":\"\n\"}", "]"] {
        assert_eq!(filtered(malformed.as_bytes(), 1), Err(InvalidJson), "{malformed}");
    }
}
