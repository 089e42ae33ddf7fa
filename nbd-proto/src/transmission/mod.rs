//! The transmission phase (section "Transmission").
//!
//! ```text
//!   client                                               server
//!   Request (+ payload of WRITE)  ------------------->   checked by server::Transmission
//!                                 <-------------------   simple reply, or chunks up to DONE
//! ```
//!
//! [`server::Transmission`] turns bytes into validated requests: it alone checks bounds, flags,
//! read-only and block sizes. [`ReplyEncoder`] writes replies. [`client::Transmission`] writes
//! requests, refuses features that were not negotiated, and checks every reply against its request.

pub mod client;
mod coverage;
mod event;
mod in_flight;
mod pending;
mod reply;
mod request;
mod saved;
pub mod server;

pub use reply::{Position, ReplyEncoder};
pub use request::{
    Command, Durability, ExtentLimit, Fragmentation, Request, RequestTag, Speed, ZeroMode,
};
pub use saved::SavedConnection;
