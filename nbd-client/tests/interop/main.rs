//! The client against the servers people use.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../common/mod.rs"]
mod common;

mod blocking;
mod examples;
mod handed_over;
mod nbd_server;
mod nbdkit;
mod our_server;
mod qemu_nbd;
mod reconnect;
#[cfg(feature = "image")]
mod storage;
mod tls;
