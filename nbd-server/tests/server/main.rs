//! The server as its clients see it: one file per scenario, a test is named after what it guards.

// Helpers of tests fail like tests; clippy.toml allows it in functions marked as tests only.
#![allow(unreachable_pub, clippy::unwrap_used, clippy::print_stdout)]

mod support;

mod access;
mod block_status;
mod budgets;
mod connection_cap;
mod disconnects;
mod durability;
mod embedding;
mod exports;
mod fairness;
mod filter;
mod handshake_floods;
mod handshake_timeout;
mod hole_lookups;
mod holes;
mod image_space;
mod interop;
mod listening;
mod loop_device;
mod multi_conn;
mod ordering;
mod panics;
mod pause;
mod payload_sizes;
mod quotas;
mod read_errors;
mod refusals;
mod ring;
mod ring_writes;
mod run_time_changes;
mod send_file;
mod shutdown;
mod splits;
mod stall;
mod statistics;
mod stress;
#[cfg(feature = "tls")]
mod tls;
mod write_in_place;
