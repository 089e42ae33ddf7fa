//! The control socket: inspection and control of a running server.
//!
//! `nbd-cli serve --control PATH` listens on a unix socket that only its own user can use (mode
//! 0600). A client sends one JSON object per line and receives one JSON object per line, in the
//! order of its requests. A line is at most 64 KiB long.
//!
//! A request has a `command` and the command's fields; unknown fields are refused. A reply has
//! either a `result` (an object) or an `error` with a `kind` (`invalid-request`, `not-found`,
//! `already-exists`, `in-use`, `failed`) and a human-readable `message`.
//!
//! ```text
//! {"command":"list"}
//! {"result":{"exports":[{"name":"disk","size":1073741824,…}],"clients":[…]}}
//! {"command":"checkpoint-start","export":"disk","bitmap":"daily"}
//! {"result":{"view":"disk.checkpoint","bitmap":"daily","uris":["nbd+unix:///disk.checkpoint?…"]}}
//! {"command":"checkpoint-end","export":"disk","outcome":"success"}
//! {"result":{}}
//! ```
//!
//! A checkpoint begun with `"lifetime":"connection"` is ended as failed if that connection closes
//! first.
//!
//! The commands are the variants of [`Request`].

mod client;
mod codec;
mod protocol;
#[cfg(feature = "server")]
pub mod server;
mod traffic;

pub use self::client::{Conversation, call};
pub use self::codec::{decode, encode};
pub use self::protocol::{
    CheckpointStarted, ClientState, ErrorKind, ExportState, Failure, IfMissing, IfUnusable,
    InitialState, Lifetime, Listing, MAX_LINE_LEN, OnUse, Outcome, Request, StreamAction,
    StreamPhase, StreamState, TogetherCheckpoint,
};
pub use self::traffic::Traffic;
