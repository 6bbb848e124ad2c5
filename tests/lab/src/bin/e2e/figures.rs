//! Distributions, in a line or as rows of a table.

const SHARES: [(&str, f64); 5] = [("min", 0.0), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)];

/// Milliseconds, summed up as `min 1, p50 2, p90 3, p99 4, max 5 ms`.
pub fn spread(milliseconds: Vec<f64>) -> String {
    if milliseconds.is_empty() {
        return "none".to_owned();
    }
    let words: Vec<String> = shares(milliseconds).map(|(name, value)| format!("{name} {value:.0}")).collect();
    format!("{} ms", words.join(", "))
}

/// The head of a table of [`row`]s.
pub fn head(what: &str) -> String {
    format!("| {what} | {} |\n|---{}|", SHARES.map(|(name, _)| name).join(" | "), "|---:".repeat(SHARES.len()))
}

/// The same shares, as a row.
pub fn row(what: &str, milliseconds: Vec<f64>) -> String {
    let words: Vec<String> = shares(milliseconds).map(|(_, value)| format!("{value:.0}")).collect();
    format!("| {what} | {} |", words.join(" | "))
}

fn shares(mut milliseconds: Vec<f64>) -> impl Iterator<Item = (&'static str, f64)> {
    milliseconds.sort_by(f64::total_cmp);
    SHARES.into_iter().filter_map(move |(name, share)| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let index = (share * milliseconds.len().saturating_sub(1) as f64).round() as usize;
        milliseconds.get(index).map(|value| (name, *value))
    })
}
