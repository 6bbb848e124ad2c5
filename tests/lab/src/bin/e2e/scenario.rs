//! The scenarios, in the order in which they are run.

mod agent_lost;
mod bad_version;
mod first_act;
mod host_network;
mod load;
mod newcomer;
mod pressure;
mod privileges;
mod published;
mod reboot;
mod removal;
mod reuse;
mod rights;
mod rollback;
mod rollout;
mod smoke;
mod startup_taint;

use crate::cluster::Cluster;

/// How much of it.
pub struct Scale {
    pub first_act: usize,
    pub churn: u64,
}

/// Says in one line what was seen.
type Scenario = fn(&Cluster, &Scale) -> anyhow::Result<String>;

pub const ALL: &[(&str, Scenario)] = &[
    ("smoke", smoke::run),
    ("privileges", privileges::run),
    ("first-act", first_act::run),
    ("rights", rights::run),
    ("rollout", rollout::run),
    ("bad-version", bad_version::run),
    ("rollback", rollback::run),
    ("agent-lost", agent_lost::run),
    ("pressure", pressure::run),
    ("host-network", host_network::run),
    ("reuse", reuse::run),
    ("reboot", reboot::run),
    ("removal", removal::run),
    ("published", published::run),
    ("newcomer", newcomer::run),
    ("startup-taint", startup_taint::run),
];

/// Those that are run when they are named only.
pub const ON_REQUEST: &[(&str, Scenario)] = &[("first-act-without-records", first_act::without_records)];

/// What an old SDK does (boto2): asks for the role's name, then for its credentials, each once and with a timeout of
/// one second. Leaves in `$key` the access key id, or exits 1 and says what failed.
pub const ASK: &str = r#"
imds=http://169.254.169.254/latest/meta-data/iam/security-credentials/
say() { echo "$*" >/dev/termination-log; }
ask() {
  role=$(timeout 1 wget -q -O - $imds 2>&1) || { say "role list: $role"; return 1; }
  answer=$(timeout 1 wget -q -O - $imds$role 2>&1) || { say "credentials of $role: $answer"; return 1; }
  key=$(echo "$answer" | sed -n 's/.*"AccessKeyId" *: *"\([A-Z0-9]*\)".*/\1/p')
}
"#;
