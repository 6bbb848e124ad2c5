//! Third stage: [`Workload`] → [`Grant`]: the role that the pod's service account may assume, and the session parameters.
//!
//! The service account's current annotations decide, not those at the creation of the pod. There is no default role.
//! This stage depends on neither HTTP serving nor AWS calls.

mod account_store;
pub mod accounts;
mod annotations;
mod arn;

use std::{
    fmt,
    hash::{Hash, Hasher},
    path::PathBuf,
    sync::Arc,
};

use clap::ValueEnum;
use tokio::time::{Duration, Instant};

pub use accounts::{Account, AccountEvent, Accounts};
pub use annotations::Defaults;
pub use arn::RoleArn;

use crate::{
    attribute::{PodUid, ServiceAccountName, Workload},
    refusal::{Reason, Refusal},
};
use annotations::SessionAnnotations;

/// Maximum lag of the service-account watch behind a live read.
const MAX_WATCH_LAG: Duration = Duration::from_secs(60);

/// Which pods share a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub enum SessionScope {
    /// The pods of one service account on this node share a session.
    ServiceAccount,
    /// Each pod has its own session.
    Pod,
}

/// Permission for a pod to assume a role, with the parameters of the session. Only this stage constructs it.
#[derive(Debug, Clone)]
pub struct Grant {
    workload: Workload,
    key: Arc<SessionKey>,
    require_imdsv2: bool,
    created: Instant,
}

/// Identifies a session by everything that changes what STS returns. The role alone does not: two service accounts with
/// the same role are two principals.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionKey {
    pub account: ServiceAccountName,
    /// Tells a recreated service account from the deleted one.
    pub account_uid: Arc<str>,
    pub pod: Option<PodUid>,
    pub role: RoleArn,
    pub session_name: String,
    pub audience: String,
    pub duration: Duration,
    pub policy: Option<String>,
    pub policy_arns: Vec<String>,
    /// Token file of a workload outside Kubernetes.
    pub token_file: Option<PathBuf>,
}

/// Hashes the fields that nearly always differ; equality compares all of them.
impl Hash for SessionKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.account.hash(state);
        self.pod.hash(state);
        self.role.hash(state);
    }
}

impl Grant {
    pub fn workload(&self) -> &Workload {
        &self.workload
    }

    pub fn key(&self) -> &Arc<SessionKey> {
        &self.key
    }

    pub fn role(&self) -> &RoleArn {
        &self.key.role
    }

    /// Returns the age of this grant. A session keeps the first grant of each of its pods.
    pub fn age(&self) -> Duration {
        self.created.elapsed()
    }

    /// Returns whether the service account requires IMDSv2 for its pods.
    pub fn requires_imdsv2(&self) -> bool {
        self.require_imdsv2
    }

    /// Returns a grant for tests of later stages.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn sample(workload: Workload, role: &str) -> Self {
        let account = Account::from_annotations("sa-uid", [("eks.amazonaws.com/role-arn", role)]);
        Self::from_account(workload, &account, &Defaults::sample()).unwrap()
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn from_account(workload: Workload, account: &Account, defaults: &Defaults) -> Result<Self, Refusal> {
        grant(workload, account, defaults)
    }
}

/// Decides which role a workload may assume.
#[derive(Debug)]
pub struct Authorizer {
    accounts: Accounts,
    defaults: Defaults,
}

impl Authorizer {
    pub fn new(accounts: Accounts, defaults: Defaults) -> Self {
        Self { accounts, defaults }
    }

    pub fn accounts(&self) -> &Accounts {
        &self.accounts
    }

    /// Returns a number that changes with every change of the known accounts. While it is the same, so are the results of
    /// [`Authorizer::grant_if_cached`]. Read it before the result.
    pub fn generation(&self) -> u64 {
        self.accounts.generation()
    }

    /// Returns the workload's grant if its service account is known, without a call to the API server.
    pub fn grant_if_cached(&self, workload: &Workload) -> Option<Grant> {
        let account = self.accounts.get(workload)?;
        grant(workload.clone(), &account, &self.defaults).ok()
    }

    /// Returns whether the grant still holds, as far as is known without a call to the API server. After a live read of an
    /// account, the watch may not have shown it yet.
    pub fn is_current(&self, grant: &Grant) -> bool {
        match self.grant_if_cached(&grant.workload) {
            Some(now) => now.key == grant.key,
            None => grant.age() < MAX_WATCH_LAG,
        }
    }

    /// Returns whether the workload's service account is unknown and nobody fetches it yet. A caller that gets `true` must
    /// call [`Authorizer::fetch_account`].
    pub fn begin_fetch(&self, workload: &Workload) -> bool {
        self.accounts.begin_fetch(workload)
    }

    /// Reads a service account until it is known, or until no pod uses it any more.
    pub async fn fetch_account(&self, account: &ServiceAccountName) {
        self.accounts.fetch(account, &self.defaults.role_annotation()).await;
    }

    /// Drops the service accounts that no pod uses any more.
    pub fn forget_unused(&self) {
        self.accounts.forget_unused();
    }

    /// Returns whether the service accounts have been listed.
    pub fn is_ready(&self) -> bool {
        self.accounts.is_synced()
    }

    /// Returns the workload's grant. Waits until the service accounts have been listed.
    ///
    /// # Errors
    /// `NoRole` if the service account has no role; `BadAnnotation` if one of its annotations is malformed;
    /// `AccountUnavailable` if it cannot be read.
    pub async fn authorize(&self, workload: &Workload) -> Result<Grant, Refusal> {
        let account = match self.accounts.get(workload) {
            Some(account) => account,
            None => self.accounts.get_or_read(workload, &self.defaults.role_annotation()).await?,
        };
        grant(workload.clone(), &account, &self.defaults)
    }
}

fn grant(workload: Workload, account: &Account, defaults: &Defaults) -> Result<Grant, Refusal> {
    let (key, require_imdsv2) = match account.shared_key.get() {
        Some(shared) => shared.clone(),
        None => {
            let parsed = parse_key(&workload, account, defaults)?;
            if parsed.0.pod.is_none() {
                // The key is the same for all pods of the account. A change of its annotations creates a new `Account`.
                let _ = account.shared_key.set(parsed.clone());
            }
            parsed
        }
    };
    Ok(Grant { workload, key, require_imdsv2, created: Instant::now() })
}

/// Returns the session key, and whether the account requires IMDSv2.
fn parse_key(workload: &Workload, account: &Account, defaults: &Defaults) -> Result<(Arc<SessionKey>, bool), Refusal> {
    let name = workload.service_account().clone();
    let annotations = SessionAnnotations::parse(account, defaults)
        .map_err(|error| Refusal::new(Reason::BadAnnotation, format!("service account {name}: {error}")))?;
    let Some(annotations) = annotations else {
        return Err(Refusal::new(
            Reason::NoRole,
            format!("service account {name} has no annotation {}", defaults.role_annotation()),
        ));
    };
    let per_pod = annotations.scope == SessionScope::Pod;
    let owner = if per_pod { format!("{name}/{}", workload.pod()) } else { name.to_string() };
    let key = SessionKey {
        account_uid: account.uid.clone(),
        pod: per_pod.then(|| workload.uid().clone()),
        role: annotations.role,
        session_name: session_name(&owner),
        audience: annotations.audience,
        duration: annotations.duration,
        policy: annotations.policy,
        policy_arns: annotations.policy_arns,
        token_file: account.token_file.clone(),
        account: name,
    };
    Ok((Arc::new(key), annotations.require_imdsv2))
}

/// Converts `namespace/name[/pod]` to a session name (`[\w+=,.@-]{2,64}`). A name that is too long is truncated, with a
/// hash of the whole appended. The name is the same at every refresh: services such as MSK drop a client whose principal
/// changes. See <https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRoleWithWebIdentity.html>.
fn session_name(owner: &str) -> String {
    const MAX: usize = 64;
    let name: String = owner
        .chars()
        .map(|c| match c {
            '/' => '.',
            c if c.is_ascii_alphanumeric() || "_+=,.@-".contains(c) => c,
            _ => '-',
        })
        .collect();
    if name.len() <= MAX {
        return name;
    }
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, owner.as_bytes());
    let suffix: String = digest.as_ref().iter().take(5).map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{suffix}", &name[..MAX - suffix.len() - 1])
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as {}", self.key.account, self.key.role)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLE: &str = "arn:aws:iam::111122223333:role/reader";

    #[test]
    fn session_names_are_stable_and_bounded() {
        assert_eq!(session_name("default/reader"), "default.reader");
        let long = |pod: &str| session_name(&format!("{}/{}/{pod}", "n".repeat(63), "s".repeat(63)));
        assert_eq!(long("a").len(), 64);
        assert_eq!(long("a"), long("a"));
        assert_ne!(long("a"), long("b"), "the hash covers the truncated part");
    }

    #[test]
    fn service_accounts_do_not_share_sessions() {
        let one = Grant::sample(Workload::sample("p", "u1", "reader"), ROLE);
        let two = Grant::sample(Workload::sample("q", "u2", "writer"), ROLE);
        let three = Grant::sample(Workload::sample("r", "u3", "reader"), ROLE);
        assert_ne!(one.key(), two.key());
        assert_eq!(one.key(), three.key(), "pods of one service account share a session");
    }

    #[test]
    fn pod_scope_separates_pods() {
        let grant_for = |pod: &str, uid: &str| {
            let annotations = [("eks.amazonaws.com/role-arn", ROLE), ("kirsa.dev/session-scope", "pod")];
            let account = Account::from_annotations("sa", annotations);
            grant(Workload::sample(pod, uid, "reader"), &account, &Defaults::sample()).unwrap()
        };
        assert_ne!(grant_for("a-0", "u1").key(), grant_for("a-1", "u2").key());
        assert_eq!(grant_for("a-0", "u1").key().session_name, "default.reader.a-0");
    }
}
