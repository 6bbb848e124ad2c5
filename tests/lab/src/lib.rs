//! Real parts, and stand-ins at the wire where there are none, for kirsa's tests, demo and benchmarks.
//! Never shipped. Everything happens in namespaces of the program's own: see [`namespace`].

pub mod agent;
pub mod apiserver;
pub mod clients;
pub mod cni;
pub mod http;
pub mod imds;
pub mod issuer;
mod listener;
pub mod namespace;
pub mod net;
pub mod netns;
pub mod poll;
pub mod process;
pub mod sdk;
pub mod site;
pub mod soak;
pub mod sts;
pub mod tools;
pub mod workloads;

#[doc(hidden)]
pub use ctor;
