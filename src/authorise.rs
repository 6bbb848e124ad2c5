//! Third stage: [`Workload`] → [`Grant`]: which role the pod's service account may have, and on what terms.
//!
//! The service account's annotations decide, read now, not when the pod was made. There is no default role. Knows no
//! HTTP and no AWS calls.

pub mod accounts;
mod arn;
mod known;
mod terms;

use std::{
    fmt,
    hash::{Hash, Hasher},
    path::PathBuf,
    sync::Arc,
};

use clap::ValueEnum;
use tokio::time::{Duration, Instant};

pub use accounts::{Account, Accounts, Told};
pub use arn::RoleArn;
pub use terms::Defaults;

use crate::{
    attribute::{PodUid, ServiceAccountName, Workload},
    refusal::{Reason, Refusal},
};
use terms::Terms;

/// By how much the watch of service accounts may lag behind a live read.
const WATCH_LAG: Duration = Duration::from_secs(60);

/// Who shares a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub enum Scope {
    /// The pods of one service account on this node.
    ServiceAccount,
    /// Nobody: every pod has one of its own.
    Pod,
}

/// What STS is to be asked for on behalf of a pod. Only this stage makes one.
#[derive(Debug, Clone)]
pub struct Grant {
    workload: Workload,
    key: Arc<Key>,
    require_imdsv2: bool,
    made: Instant,
}

/// Everything that changes what STS would return, and so tells sessions apart. Never the role alone: two service
/// accounts with one role are two principals.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub account: ServiceAccountName,
    /// A service account that was deleted and made anew is another one.
    pub account_uid: Arc<str>,
    pub pod: Option<PodUid>,
    pub role: RoleArn,
    pub session_name: String,
    pub audience: String,
    pub duration: Duration,
    pub policy: Option<String>,
    pub policy_arns: Vec<String>,
    /// Where a workload that Kubernetes does not know has its token.
    pub token_file: Option<PathBuf>,
}

/// Enough to tell nearly all keys apart; equality looks at everything.
impl Hash for Key {
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

    pub fn key(&self) -> &Arc<Key> {
        &self.key
    }

    pub fn role(&self) -> &RoleArn {
        &self.key.role
    }

    /// A session keeps the first grant of each of its pods: this is how long the pod has been known to it.
    pub fn age(&self) -> Duration {
        self.made.elapsed()
    }

    /// The service account wants none of its pods to be answered without a session token.
    pub fn requires_imdsv2(&self) -> bool {
        self.require_imdsv2
    }

    /// For tests of later stages.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn sample(workload: Workload, role: &str) -> Self {
        let account = Account::of_annotations("sa-uid", [("eks.amazonaws.com/role-arn", role)]);
        Self::of_account(workload, &account, &Defaults::sample()).unwrap()
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn of_account(workload: Workload, account: &Account, defaults: &Defaults) -> Result<Self, Refusal> {
        grant(workload, account, defaults)
    }
}

/// Decides what a workload may have.
#[derive(Debug)]
pub struct Authoriser {
    accounts: Accounts,
    defaults: Defaults,
}

impl Authoriser {
    pub fn new(accounts: Accounts, defaults: Defaults) -> Self {
        Self { accounts, defaults }
    }

    pub fn accounts(&self) -> &Accounts {
        &self.accounts
    }

    /// For as long as it is the same, so is every answer of [`Authoriser::foresee`]. To be read before the answer.
    pub fn edition(&self) -> u64 {
        self.accounts.edition()
    }

    /// What the workload is going to be granted as far as that is known without asking anybody.
    pub fn foresee(&self, workload: &Workload) -> Option<Grant> {
        let account = self.accounts.annotated(workload)?;
        grant(workload.clone(), &account, &self.defaults).ok()
    }

    /// Whether a grant of earlier would be made now, as far as that is known without asking anybody. An account that
    /// was read live a moment ago may not be known by the watch yet.
    pub fn still(&self, grant: &Grant) -> bool {
        match self.foresee(&grant.workload) {
            Some(now) => now.key == grant.key,
            None => grant.age() < WATCH_LAG,
        }
    }

    /// Returns whether the workload's service account must be [learned](Authoriser::learn) before the workload can be
    /// foreseen. The caller that gets `true` has to call that.
    pub fn begin_learning(&self, workload: &Workload) -> bool {
        self.accounts.begin_learning(workload)
    }

    /// Reads a service account until it is known, or until no pod uses it any more.
    pub async fn learn(&self, account: &ServiceAccountName) {
        self.accounts.learn(account, &self.defaults.role_annotation()).await;
    }

    /// Drops the service accounts that no pod uses any more.
    pub fn forget_unused(&self) {
        self.accounts.forget_unused();
    }

    /// Whether the service accounts have been read.
    pub fn is_ready(&self) -> bool {
        self.accounts.are_read()
    }

    /// Waits while they are not.
    ///
    /// # Errors
    /// The service account has no role, or an annotation of it is malformed; or it is not known yet.
    pub async fn authorise(&self, workload: &Workload) -> Result<Grant, Refusal> {
        let account = match self.accounts.annotated(workload) {
            Some(account) => account,
            None => self.accounts.find(workload, &self.defaults.role_annotation()).await?,
        };
        grant(workload.clone(), &account, &self.defaults)
    }
}

fn grant(workload: Workload, account: &Account, defaults: &Defaults) -> Result<Grant, Refusal> {
    let (key, require_imdsv2) = match account.shared.get() {
        Some(shared) => shared.clone(),
        None => {
            let read = key(&workload, account, defaults)?;
            if read.0.pod.is_none() {
                // The same for all its pods until its annotations change, which makes another account of it.
                let _ = account.shared.set(read.clone());
            }
            read
        }
    };
    Ok(Grant { workload, key, require_imdsv2, made: Instant::now() })
}

/// With whether the account requires IMDSv2.
fn key(workload: &Workload, account: &Account, defaults: &Defaults) -> Result<(Arc<Key>, bool), Refusal> {
    let name = workload.service_account().clone();
    let terms = Terms::read(account, defaults)
        .map_err(|wrong| Refusal::new(Reason::BadAnnotation, format!("service account {name}: {wrong}")))?;
    let Some(terms) = terms else {
        return Err(Refusal::new(
            Reason::NoRole,
            format!("service account {name} has no annotation {}", defaults.role_annotation()),
        ));
    };
    let per_pod = terms.scope == Scope::Pod;
    let session = if per_pod { format!("{name}/{}", workload.pod()) } else { name.to_string() };
    let key = Key {
        account_uid: account.uid.clone(),
        pod: per_pod.then(|| workload.uid().clone()),
        role: terms.role,
        session_name: session_name(&session),
        audience: terms.audience,
        duration: terms.duration,
        policy: terms.policy,
        policy_arns: terms.policy_arns,
        token_file: account.token_file.clone(),
        account: name,
    };
    Ok((Arc::new(key), terms.require_imdsv2))
}

/// `namespace/name[/pod]` as STS allows it (`[\w+=,.@-]{2,64}`), the same at every refresh: services such as MSK drop
/// a client whose principal changes. What does not fit is cut, and told apart by a hash of the whole.
fn session_name(of: &str) -> String {
    const MAX: usize = 64;
    let name: String = of
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
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, of.as_bytes());
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
    fn session_names_are_stable_and_fit() {
        assert_eq!(session_name("default/reader"), "default.reader");
        let long = |pod: &str| session_name(&format!("{}/{}/{pod}", "n".repeat(63), "s".repeat(63)));
        assert_eq!(long("a").len(), 64);
        assert_eq!(long("a"), long("a"));
        assert_ne!(long("a"), long("b"), "the hash covers what was cut");
    }

    #[test]
    fn service_accounts_with_one_role_do_not_share_a_session() {
        let one = Grant::sample(Workload::sample("p", "u1", "reader"), ROLE);
        let two = Grant::sample(Workload::sample("q", "u2", "writer"), ROLE);
        let three = Grant::sample(Workload::sample("r", "u3", "reader"), ROLE);
        assert_ne!(one.key(), two.key());
        assert_eq!(one.key(), three.key(), "the pods of one service account do");
    }

    #[test]
    fn scope_pod_keeps_pods_apart() {
        let of = |pod: &str, uid: &str| {
            let annotations = [("eks.amazonaws.com/role-arn", ROLE), ("kirsa.dev/session-scope", "pod")];
            let account = Account::of_annotations("sa", annotations);
            grant(Workload::sample(pod, uid, "reader"), &account, &Defaults::sample()).unwrap()
        };
        assert_ne!(of("a-0", "u1").key(), of("a-1", "u2").key());
        assert_eq!(of("a-0", "u1").key().session_name, "default.reader.a-0");
    }
}
