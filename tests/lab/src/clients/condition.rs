//! The conditions that a client meets: the columns of the matrix.

use std::time::Duration;

use crate::sts::Effect;

/// What is the case when a client makes a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Condition {
    /// Nothing is in hand, and the exchange takes so many milliseconds.
    Cold(u64),
    /// The pod was bound a second ago, and the exchange takes so many milliseconds.
    Bound(u64),
    /// A second program in the pod of the first.
    Warm,
    /// The agent is another one than at the program's first call.
    Restarted,
    ImdsV2Required,
    NoRole,
    /// By STS.
    Denied,
    /// STS resets every connection.
    StsDown,
}

impl Condition {
    pub const ALL: [Self; 11] = [
        Self::Cold(0),
        Self::Cold(700),
        Self::Cold(1_200),
        Self::Cold(2_000),
        Self::Bound(2_000),
        Self::Warm,
        Self::Restarted,
        Self::ImdsV2Required,
        Self::NoRole,
        Self::Denied,
        Self::StsDown,
    ];

    /// The head of its column.
    pub fn title(self) -> String {
        let seconds = |milliseconds| Duration::from_millis(milliseconds).as_secs_f64();
        match self {
            Self::Cold(delay) => format!("cold, {}", seconds(delay)),
            Self::Bound(delay) => format!("bound, {}", seconds(delay)),
            Self::Warm => "warm".into(),
            Self::Restarted => "restarted".into(),
            Self::ImdsV2Required => "v2 only".into(),
            Self::NoRole => "no role".into(),
            Self::Denied => "denied".into(),
            Self::StsDown => "STS down".into(),
        }
    }

    /// For the names of pods and service accounts.
    pub(super) fn name(self) -> String {
        self.title().to_ascii_lowercase().replace([',', '.'], "").replace(' ', "-")
    }

    /// What happens to the exchanges of its pod's role.
    pub(super) fn effect(self) -> Option<Effect> {
        match self {
            Self::Cold(delay) | Self::Bound(delay) => (delay > 0).then_some(Effect::Delay(delay)),
            Self::Denied => Some(Effect::error("AccessDenied")),
            Self::StsDown => Some(Effect::Reset),
            Self::Warm | Self::Restarted | Self::ImdsV2Required | Self::NoRole => None,
        }
    }
}
