//! The client against servers that follow a script, byte by byte, and mostly misbehave.
#![allow(clippy::unwrap_used, missing_docs)]

mod script;

mod bad_handshakes;
mod bad_replies;
mod cancel;
mod death;
mod disconnect;
mod fallback;
mod limits;
mod listener;
mod many_connections;
mod reconnect;
mod request_timeout;
mod surprises;
mod tls;
