//! Commands on object stores that fail, commands that are killed, and how many requests commands
//! make: the built program against a store in memory that does at each request what a test wants.
//!
//! `NBD_STORE_POINTS` is the number of requests of each command that meet a fault, chosen by
//! `NBD_SEED`; a number that is large enough means all. `cargo xtask soak` chooses others in each
//! round. `NBD_STORE_SHOW` prints what the program says.
#![allow(clippy::print_stdout, reason = "soak counts what was judged")]

mod support;

mod counts;
mod faults;
mod kills;
mod large;
