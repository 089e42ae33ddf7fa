//! What the scenarios share: a server on a socket of its own, a client that can also misbehave,
//! exports that do as they are told, and random numbers that can be had again.

mod client;
mod exports;
mod handshake;
mod images;
mod peers;
mod random;
mod server;
mod workload;

pub use client::{Client, header};
pub use exports::{Script, Scripted};
pub use images::{allocated_bytes, disk_file, image_export};
pub use peers::{output_of, run_peer, skip};
pub use random::Random;
pub use server::TestServer;
pub use workload::Workload;

use std::time::{Duration, Instant};

use nbd_proto::wire::ReplyMode;

/// Every form of replies.
pub const MODES: [ReplyMode; 3] = [ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended];

/// Longer than anything here takes. What is waited for this long has failed.
pub const LONG: Duration = Duration::from_secs(60);

/// Waits until `holds`. Fails after [`LONG`].
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < LONG, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
