//! Real, unmodified AWS clients of every age and language in pods: what each makes of the agent in every condition
//! that a pod can be in, and whose credentials it then signs with.
//!
//! `tests/clients/install.sh` gets them; their programs are beside it. What is not installed is not run.

mod catalogue;
mod cell;
mod client;
mod condition;
mod expected;
mod installed;
mod kept;
mod report;
mod row;
mod run;

pub use self::{
    catalogue::CLIENTS,
    cell::{Cell, Verdict},
    client::{Client, Set},
    condition::Condition,
    expected::{Miss, again, miss},
    installed::Installed,
    kept::{Kept, kept},
    report::{Report, into_page},
    row::row,
};
