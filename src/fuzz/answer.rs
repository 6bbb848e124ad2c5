//! Answers of the API server.

use serde_json::Value;

use crate::{
    authorize,
    kubernetes::json_filter::{InvalidJson, JsonFilter},
};

const ROLE: &str = "eks.amazonaws.com/role-arn";
/// Maximum length of a token that the filter holds: the longest annotation, each byte of it escaped.
const HELD: usize = 6 * 8_192 + 2;

fn filtered(data: &[u8], piece: usize) -> (Result<(), InvalidJson>, Vec<u8>) {
    let (mut filter, mut out) = (JsonFilter::new(authorize::accounts::keep(ROLE)), Vec::new());
    let result = data.chunks(piece).try_for_each(|bytes| {
        let result = filter.push(bytes, &mut out);
        assert!(filter.buffered() <= HELD, "{} bytes held", filter.buffered());
        result
    });
    (result, out)
}

pub fn check(data: &[u8]) {
    let (result, out) = filtered(data, data.len().max(1));
    assert!(out.len() <= data.len(), "filtering only removes");
    for piece in [1, 7] {
        assert_eq!(filtered(data, piece), (result.clone(), out.clone()), "pieces of {piece}");
    }
    let Ok(whole) = serde_json::from_slice::<Value>(data) else { return };
    if result.is_ok() && (whole.is_object() || whole.is_array()) {
        let kept: Value = serde_json::from_slice(&out).expect("JSON stays JSON");
        for path in ["/metadata/name", "/metadata/uid", "/object/metadata/uid", "/spec/serviceAccountName"] {
            let short = whole.pointer(path).and_then(Value::as_str).filter(|text| text.len() <= 4_096);
            if let Some(text) = short {
                assert_eq!(kept.pointer(path).and_then(Value::as_str), Some(text), "{path}");
            }
        }
    }
}
