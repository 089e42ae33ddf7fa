//! The bytes on the wire, written down field by field from the specification, against both
//! machines. Where a listing and an encoder disagree, the specification decides.

// Helpers of tests fail like tests; clippy.toml allows it in functions marked as tests only.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;

mod example;
mod handshake;
mod replies;
mod requests;
