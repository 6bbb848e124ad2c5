//! What the stand-in knows at a moment: providers, roles, sessions, faults and settings. Shared by the
//! handle, the STS listener and the control listener.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::{
    call::Log,
    fault::Faults,
    identity::Act,
    keys::{KeyRing, Keys},
    role::Role,
    session::Sessions,
};

/// An OpenID Connect provider as it is registered with IAM.
#[derive(Debug, Clone)]
pub struct Provider {
    /// Its URL, exactly as tokens carry it in `iss`.
    pub issuer: String,
    /// The audiences that are accepted.
    pub client_ids: Vec<String>,
    pub keys: Keys,
}

impl Provider {
    /// A provider for tokens with the audience of STS.
    pub fn new(issuer: &str, keys: Keys) -> Self {
        Self { issuer: issuer.to_owned(), client_ids: vec!["sts.amazonaws.com".to_owned()], keys }
    }
}

/// Whose STS is stood in for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dialect {
    #[default]
    Aws,
    /// Takes role ARNs without an account, names no assumed role, and refuses everything by
    /// 400 `InvalidParameterValue`.
    Minio,
    /// Takes role ARNs without an account, and names the members of the credentials in alphabetical
    /// order: an answer that is cut short still has its expiration, which is finer than a second.
    Ceph,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    pub dialect: Dialect,
    /// How far the clock of the STS is ahead of this machine's: shifts `Expiration`, `Date` and the
    /// checks of sessions, not those of tokens, because the token's issuer has the right time too.
    pub clock_skew_seconds: i64,
    /// Issues sessions of this length whatever was asked for.
    pub session_seconds: Option<u32>,
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) providers: BTreeMap<String, Registered>,
    pub(super) roles: BTreeMap<String, Role>,
    pub(super) sessions: Sessions,
    pub(super) faults: Faults,
    pub(super) settings: Settings,
    pub(super) acts: Vec<Act>,
}

/// A provider with its keys as far as they were fetched.
#[derive(Debug, Clone)]
pub(super) struct Registered {
    pub(super) client_ids: Vec<String>,
    pub(super) keys: Arc<KeyRing>,
}

impl World {
    pub(super) fn register(&mut self, provider: Provider) {
        let keys = Arc::new(KeyRing::new(provider.keys));
        self.providers.insert(provider.issuer, Registered { client_ids: provider.client_ids, keys });
    }

    pub(super) fn set_role(&mut self, role: Role) {
        self.roles.insert(role.arn.clone(), role);
    }

    pub(super) fn expire_sessions(&mut self) {
        let now = self.now();
        self.sessions.expire(now);
    }

    /// The time by the clock of the STS.
    pub(super) fn now(&self) -> Timestamp {
        Timestamp::now() + SignedDuration::from_secs(self.settings.clock_skew_seconds)
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) log: Log,
    world: Mutex<World>,
}

impl Shared {
    pub(super) fn new(settings: Settings, providers: Vec<Provider>, roles: Vec<Role>) -> Self {
        let mut world = World {
            providers: BTreeMap::new(),
            roles: BTreeMap::new(),
            sessions: Sessions::default(),
            faults: Faults::default(),
            settings,
            acts: Vec::new(),
        };
        providers.into_iter().for_each(|provider| world.register(provider));
        roles.into_iter().for_each(|role| world.set_role(role));
        Self { log: Log::default(), world: Mutex::new(world) }
    }

    pub(super) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
