//! The Network Block Device protocol without I/O.
//!
//! Bytes go in, values and bytes come out. The crate contains no sockets, files, clocks or
//! runtimes. The owner of the connection (`nbd-server`, `nbd-client`, a test, a fuzz target)
//! receives bytes, passes them in, and sends the result.
//!
//! ```text
//!            bytes from the peer                     bytes to the peer
//!                   |                                       ^
//!                   v                                       |
//!   handshake::server / handshake::client  ---- Negotiated ----> transmission::server / ::client
//!         (options, one at a time)                            (requests, replies, chunks)
//!                   \_______________ wire: one file per table of the specification ______/
//! ```
//!
//! The specification is `doc/proto.md` of the NetworkBlockDevice project together with its
//! `extension-ext-header` text; section names in this documentation refer to it.
//!
//! All functions distinguish three outcomes: *not enough bytes yet* (a return value, never an
//! error), *malformed or illegal* ([`ProtocolError`], the peer's fault), and *not negotiated*
//! ([`ApiMisuse`], the caller's fault).
//!
//! # Example
//!
//! ```
//! use nbd_proto::wire::{CommandFlags, CommandType, Cookie, RequestHeader};
//!
//! let header = RequestHeader {
//!     flags: CommandFlags::empty(),
//!     command: CommandType::READ,
//!     cookie: Cookie(7),
//!     offset: 4096,
//!     length: 512,
//! };
//! let mut bytes = Vec::new();
//! header.encode_compact(&mut bytes)?;
//! assert_eq!(bytes.len(), RequestHeader::COMPACT_LEN);
//! assert_eq!(RequestHeader::decode_compact(&bytes)?, Some(header));
//! // Half a header is not an error: more bytes are needed.
//! assert_eq!(RequestHeader::decode_compact(&bytes[..10])?, None);
//! # Ok::<(), nbd_proto::ProtocolError>(())
//! ```

pub mod codec;
pub mod error;
pub mod handshake;
pub mod host_lookup;
pub mod limits;
pub mod tls;
pub mod transmission;
pub mod uri;
pub mod wire;

pub use error::{ApiMisuse, ProtocolError};
pub use uri::NbdUri;
