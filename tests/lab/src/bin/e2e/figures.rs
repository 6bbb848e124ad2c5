//! Distributions in one line.

/// Milliseconds, summed up as `min 1, p50 2, p90 3, max 4 ms`.
pub fn spread(mut milliseconds: Vec<f64>) -> String {
    if milliseconds.is_empty() {
        return "none".to_owned();
    }
    milliseconds.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let last = milliseconds.len() - 1;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let index = (share * last as f64).round() as usize;
        milliseconds.get(index).copied().unwrap_or_default()
    };
    format!("min {:.0}, p50 {:.0}, p90 {:.0}, max {:.0} ms", at(0.0), at(0.5), at(0.9), at(1.0))
}
