//! Responses of the API server, passed through the JSON filter.

use serde_json::Value;

use crate::{
    authorize,
    kubernetes::json_filter::{InvalidJson, JsonFilter},
};

const ROLE: &str = "eks.amazonaws.com/role-arn";
/// Maximum number of buffered bytes: the longest annotation, with each byte escaped.
const MAX_BUFFERED: usize = 6 * 8_192 + 2;

fn filter(data: &[u8], chunk_size: usize) -> (Result<(), InvalidJson>, Vec<u8>) {
    let (mut filter, mut out) = (JsonFilter::new(authorize::accounts::keep(ROLE)), Vec::new());
    let result = data.chunks(chunk_size).try_for_each(|bytes| {
        let result = filter.push(bytes, &mut out);
        assert!(filter.buffered() <= MAX_BUFFERED, "{} bytes buffered", filter.buffered());
        result
    });
    (result, out)
}

pub fn check(data: &[u8]) {
    let (result, out) = filter(data, data.len().max(1));
    assert!(out.len() <= data.len(), "the filter added bytes");
    for chunk_size in [1, 7] {
        assert_eq!(filter(data, chunk_size), (result.clone(), out.clone()), "chunks of {chunk_size}");
    }
    let Ok(whole) = serde_json::from_slice::<Value>(data) else { return };
    if result.is_ok() && (whole.is_object() || whole.is_array()) {
        let kept: Value = serde_json::from_slice(&out).expect("filtered JSON is JSON");
        for path in ["/metadata/name", "/metadata/uid", "/object/metadata/uid", "/spec/serviceAccountName"] {
            let short = whole.pointer(path).and_then(Value::as_str).filter(|text| text.len() <= 4_096);
            if let Some(text) = short {
                assert_eq!(kept.pointer(path).and_then(Value::as_str), Some(text), "{path}");
            }
        }
    }
}
