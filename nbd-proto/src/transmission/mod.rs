//! The transmission phase (section "Transmission").
//!
//! ```text
//!   client                                               server
//!   Request (+ payload of WRITE)  ------------------->   checked by server::Transmission
//!                                 <-------------------   simple reply, or chunks up to DONE
//! ```
//!
//! [`server::Transmission`] turns bytes into validated requests: bounds, flags, read-only and block
//! sizes are checked there and nowhere else. [`ReplyEncoder`] writes the answers.
//! [`client::Transmission`] writes requests, refusing what was not negotiated, and checks every
//! reply against the request it answers.

pub mod client;
mod coverage;
mod event;
mod pending;
mod reply;
mod request;
pub mod server;

pub use reply::{Position, ReplyEncoder};
pub use request::{
    Command, Durability, ExtentLimit, Fragmentation, Request, RequestTag, Speed, ZeroMode,
};
