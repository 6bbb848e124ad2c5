//! Who signed a request: the proof, checked for real, of whose credentials a program got.

use std::net::IpAddr;

use bytes::Bytes;
use http::Request;

use super::{refusal::Refusal, session::Session, signature::Signature, world::Shared};
use crate::listener::Peer;

/// One request whose signature was right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Act {
    pub from: IpAddr,
    /// `assumed-role/…` of the session that signed it.
    pub arn: String,
}

/// The session that a request to `service` was signed with.
pub(super) fn of(shared: &Shared, peer: &Peer, request: &Request<Bytes>, service: &str) -> Result<Session, Refusal> {
    let signature = Signature::of(request)?;
    let mut world = shared.world();
    let session = world.sessions.get(signature.access_key_id).cloned();
    let session = session.ok_or_else(|| Refusal::by_code("InvalidClientTokenId"))?;
    signature.verify(request, service, &session, world.now())?;
    world.acts.push(Act { from: peer.address.ip(), arn: session.arn.clone() });
    Ok(session)
}
