//! IAM Roles for Service Accounts (IRSA) for programs that only support the EC2 instance metadata service.
//!
//! ```text
//! TCP connection ─intercept→ ClientConn ─attribute→ Workload ─authorize→ Grant ─cache→ Credential ─serve→ HTTP response
//!                                                                          └─exchange (token → STS)
//! ```
//!
//! Each arrow is a stage, and only that stage can construct the type it leads to: only [`intercept`] makes a
//! `ClientConn`, only [`attribute`] a `Workload`, only [`authorize`] a `Grant`, and only [`exchange`] the `Credential`
//! that [`cache`] returns. Code that would serve a credential without having passed every stage does not compile. A
//! stage names the types of the stages before it and of [`refusal`], [`observe`], [`connections`] and [`clock`], never
//! those after it; `tests/stages.rs` enforces that.

#![forbid(unsafe_code)]
#![warn(unreachable_pub)]
// Shipped code never unwraps; tests and test-only code may.
#![cfg_attr(not(any(test, fuzzing)), deny(clippy::unwrap_used, clippy::expect_used))]

pub mod clock;
pub mod config;
pub mod connections;
pub mod doctor;
pub mod kubernetes;
pub mod agent;
pub mod observe;
pub mod refusal;

// The pipeline, in the order in which a request passes through it.
pub mod intercept;
pub mod attribute;
pub mod authorize;
pub mod exchange;
pub mod cache;
pub mod serve;

#[cfg(any(test, fuzzing))]
pub mod fuzz;
