//! The messages of the control socket.

mod failure;
mod reply;
mod request;

pub use self::failure::{ErrorKind, Failure};
pub use self::reply::{
    CheckpointStarted, ClientState, ExportState, Listing, StreamPhase, StreamState,
};
pub use self::request::{
    IfMissing, IfUnusable, InitialState, Lifetime, OnUse, Outcome, Request, StreamAction,
    TogetherCheckpoint,
};

/// Longest line in both directions, in bytes, without its line feed.
pub const MAX_LINE_LEN: usize = 64 << 10;
