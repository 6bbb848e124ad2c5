//! The matrix as people read it.

use std::fmt::Write as _;

use anyhow::{Context, Result};

use super::{
    catalogue::CLIENTS,
    cell::Cell,
    client::Client,
    condition::Condition,
    expected::{Miss, miss},
};

const BEGIN: &str = "<!-- begin: make clients writes this -->";
const END: &str = "<!-- end -->";

/// A client, its version, and what came of it.
type Row = (Client, String, Vec<(Condition, Cell)>);

/// Everything that was seen.
#[derive(Debug, Default)]
pub struct Report {
    rows: Vec<Row>,
    skipped: Vec<(Client, String)>,
}

impl Report {
    pub fn add(&mut self, client: Client, version: &str, cells: Vec<(Condition, Cell)>) {
        let version = version.trim_start_matches("github.com/").to_owned();
        self.rows.push((client, version, cells));
        // Whichever came to its end first.
        self.rows.sort_by_key(|(client, ..)| CLIENTS.iter().position(|known| known.name == client.name));
    }

    pub fn skip(&mut self, client: Client, reason: String) {
        self.skipped.push((client, reason));
    }

    /// Another try, in the place of the first one.
    pub fn replace(&mut self, client: Client, condition: Condition, cell: Cell) {
        let row = self.rows.iter_mut().find(|(known, ..)| known.name == client.name);
        let cells = row.map(|(_, _, cells)| cells).into_iter().flatten();
        cells.filter(|(known, _)| *known == condition).for_each(|(_, known)| *known = cell.clone());
    }

    /// Where a client did otherwise than is expected of it.
    pub fn misses(&self) -> Vec<(Client, Condition, Miss)> {
        let rows = self.rows.iter();
        let cells = rows.flat_map(|(client, _, cells)| cells.iter().map(move |(known, _)| (client, *known, cells)));
        cells
            .filter_map(|(client, condition, cells)| Some((*client, condition, miss(client, condition, cells)?)))
            .collect()
    }

    /// As a table in Markdown, which is aligned for a terminal too.
    pub fn table(&self) -> String {
        let heads = Condition::ALL.map(Condition::title);
        let mut lines = vec![[vec!["client".into()], heads.to_vec()].concat()];
        for (client, version, cells) in &self.rows {
            let text =
                |condition: Condition| cells.iter().find(|(known, _)| *known == condition).map(|(_, c)| c.text());
            let cells = Condition::ALL.map(|condition| text(condition).unwrap_or_default());
            let _ = client;
            lines.push([vec![version.clone()], cells.to_vec()].concat());
        }
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..=heads.len()).map(width).collect();
        let mut table = String::new();
        for (number, line) in lines.iter().enumerate() {
            let cells = line.iter().zip(&widths).map(|(cell, width)| format!(" {cell:width$} "));
            let _ = writeln!(table, "|{}|", cells.collect::<Vec<_>>().join("|"));
            if number == 0 {
                let rules = widths.iter().map(|width| "-".repeat(width + 2));
                let _ = writeln!(table, "|{}|", rules.collect::<Vec<_>>().join("|"));
            }
        }
        table
    }

    /// What stood out, for the terminal.
    pub fn skipped(&self) -> Vec<String> {
        self.skipped.iter().map(|(client, reason)| format!("skipped: {}: {reason}", client.name)).collect()
    }
}

/// The page with the table in the place of the one that it has.
pub fn into_page(page: &str, report: &Report) -> Result<String> {
    let (before, rest) = page.split_once(BEGIN).context("no mark where the table begins")?;
    let (_, after) = rest.split_once(END).context("no mark where the table ends")?;
    Ok(format!("{before}{BEGIN}\n{}{END}{after}", report.table()))
}
