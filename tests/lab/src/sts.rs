//! A stand-in for AWS STS, at the wire: it speaks the query protocol, verifies the tokens that it is
//! given, and can say no in AWS's own codes. Knows nothing of who calls it.
//!
//! `AssumeRoleWithWebIdentity` checks the token against its provider's keys and the role's trust policy;
//! `GetCallerIdentity` proves whose the issued credentials are, by a signature that is checked for real.
//! Faults, call log and settings are at hand here, and for another process on a control listener.

mod ask;
mod call;
mod control;
mod fault;
mod identity;
mod keys;
mod object;
mod policy;
mod protocol;
mod refusal;
mod registry;
mod role;
mod server;
mod session;
mod signature;
#[cfg(test)]
mod tests;
mod tls;
mod token;
mod web_identity;
mod world;

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use self::world::Shared;
use crate::listener::Server;

pub use self::{
    call::{Call, Outcome},
    fault::{Effect, Fault, When},
    identity::Act,
    keys::{Jwks, Keys},
    object::{BUCKET, KEY, ObjectStore},
    registry::{PASSWORD, Registry},
    role::{Role, TrustPolicy},
    session::Session,
    tls::Tls,
    token::{Claims, Kubernetes, Object},
    world::{Dialect, Provider, Settings},
};

/// What a stand-in starts with.
#[derive(Debug, Default)]
pub struct Config {
    pub providers: Vec<Provider>,
    pub roles: Vec<Role>,
    pub settings: Settings,
    /// HTTPS instead of HTTP.
    pub tls: Option<Tls>,
    /// Where other processes find the switches.
    pub control: Option<TcpListener>,
}

/// A running stand-in; dropping it closes its listeners, so that clients are refused.
#[derive(Debug)]
pub struct StandIn {
    shared: Arc<Shared>,
    sts: Server,
    control: Option<Server>,
    scheme: &'static str,
}

impl StandIn {
    /// Serves `listener` from a thread that lives in the network namespace of the caller's.
    pub fn start(listener: TcpListener, config: Config) -> anyhow::Result<Self> {
        let Config { providers, roles, settings, tls, control } = config;
        let shared = Arc::new(Shared::new(settings, providers, roles));
        let scheme = if tls.is_some() { "https" } else { "http" };
        let state = Arc::clone(&shared);
        let sts = Server::start("sts", listener, tls.map(|tls| tls.config()), move |peer, request| {
            server::handle(Arc::clone(&state), peer, request)
        })?;
        let state = Arc::clone(&shared);
        let serve_control = |listener| {
            Server::start("sts-control", listener, None, move |peer, request| {
                control::handle(Arc::clone(&state), peer, request)
            })
        };
        let control = control.map(serve_control).transpose()?;
        Ok(Self { shared, sts, control, scheme })
    }

    /// Serves an object store that takes the credentials that were issued here.
    pub fn start_store(&self, listener: TcpListener) -> anyhow::Result<ObjectStore> {
        ObjectStore::start(listener, Arc::clone(&self.shared))
    }

    /// Serves logins of a container registry, to those who sign with the credentials that were issued here.
    pub fn start_registry(&self, listener: TcpListener) -> anyhow::Result<Registry> {
        Registry::start(listener, Arc::clone(&self.shared))
    }

    pub fn address(&self) -> SocketAddr {
        self.sts.address()
    }

    /// For `--sts-endpoint-url` and `--endpoint-url`.
    pub fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address())
    }

    pub fn control_address(&self) -> Option<SocketAddr> {
        self.control.as_ref().map(Server::address)
    }

    /// Adds a provider, or replaces it and forgets its keys.
    pub fn set_provider(&self, provider: Provider) {
        self.shared.world().register(provider);
    }

    /// Adds a role, or replaces the one with the same ARN.
    pub fn set_role(&self, role: Role) {
        self.shared.world().set_role(role);
    }

    pub fn remove_role(&self, arn: &str) {
        self.shared.world().roles.remove(arn);
    }

    /// Adds to the faults in force: all delays add up, of the other effects the first one counts.
    pub fn inject(&self, fault: Fault) {
        self.shared.world().faults.add(fault);
    }

    /// Takes all faults back.
    pub fn heal(&self) {
        self.shared.world().faults.clear();
    }

    pub fn configure(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.shared.world().settings);
    }

    /// Makes every issued session expire now.
    pub fn expire_sessions(&self) {
        self.shared.world().expire_sessions();
    }

    /// Whose credentials these are, without asking over the wire.
    pub fn session(&self, access_key_id: &str) -> Option<Session> {
        self.shared.world().sessions.get(access_key_id).cloned()
    }

    /// Every request so far, here and at the stores, whose signature was right, in the order of their arrival.
    pub fn acts(&self) -> Vec<Act> {
        self.shared.world().acts.clone()
    }

    /// Every secret key and session token that was issued, to look for where none may be.
    pub fn secrets(&self) -> Vec<String> {
        let world = self.shared.world();
        world.sessions.iter().flat_map(|s| [s.secret_access_key.clone(), s.session_token.clone()]).collect()
    }

    /// Every `AssumeRoleWithWebIdentity` so far, refused and open ones included.
    pub fn calls(&self) -> Vec<Call> {
        self.shared.log.all()
    }

    pub fn calls_for(&self, role_arn: &str) -> Vec<Call> {
        self.calls().into_iter().filter(|call| call.role_arn == role_arn).collect()
    }

    pub fn forget_calls(&self) {
        self.shared.log.forget();
    }

    /// Waits until `count` calls have arrived. Blocks its thread: from async code, use `spawn_blocking`.
    pub fn wait_for_calls(&self, count: usize, deadline: Duration) -> anyhow::Result<Vec<Call>> {
        self.shared.log.wait(deadline, |calls| calls.len() >= count)
    }

    /// Waits until `count` calls have come to an end.
    pub fn wait_for_outcomes(&self, count: usize, deadline: Duration) -> anyhow::Result<Vec<Call>> {
        self.shared.log.wait(deadline, |calls| calls.iter().filter(|call| call.outcome.is_some()).count() >= count)
    }
}
