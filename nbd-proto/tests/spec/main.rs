//! The requirements of the specification that are easy to miss, one file per section; a test is
//! named after the requirement. `security.rs` holds the flaws that other implementations had.

// Helpers of tests fail like tests; clippy.toml allows it in functions marked as tests only.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;

mod block_status;
mod chunks;
mod client_handshake;
mod client_requests;
mod info_go;
mod meta_context;
mod newstyle;
mod reply_mode;
mod requests;
mod security;
mod tls;

/// Option numbers.
mod opt {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

/// Option reply types.
mod rep {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const ERR_UNSUP: u32 = 0x8000_0001;
    pub(crate) const ERR_POLICY: u32 = 0x8000_0002;
    pub(crate) const ERR_INVALID: u32 = 0x8000_0003;
    pub(crate) const ERR_TLS_REQD: u32 = 0x8000_0005;
    pub(crate) const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub(crate) const ERR_BLOCK_SIZE_REQD: u32 = 0x8000_0008;
    pub(crate) const ERR_TOO_BIG: u32 = 0x8000_0009;
    pub(crate) const ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;
}
