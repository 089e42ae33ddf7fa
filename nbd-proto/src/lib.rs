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
//! A client and a server read one range of a disk. Two buffers stand for the socket; a program
//! sends the one that it fills and receives into the other, whenever a step needs more input:
//!
//! ```
//! use bytes::{Buf, BytesMut};
//! use nbd_proto::handshake::client::{AwaitStep, ClientHandshake, ClientStep, InfoRequest};
//! use nbd_proto::handshake::server::{GoAnswer, Handshake, HandshakeStep, ServerConfig};
//! use nbd_proto::handshake::ExportDescription;
//! use nbd_proto::transmission::client::{self, Event};
//! use nbd_proto::transmission::server::{self, Parsed};
//! use nbd_proto::transmission::{Command, Fragmentation, Position, ReplyEncoder};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let disk = b"a disk of 20 bytes..";
//! let (mut to_server, mut to_client) = (BytesMut::new(), BytesMut::new());
//!
//! // The handshake: each step consumes its machine and returns the next one.
//! let server = Handshake::start(ServerConfig::default(), &mut to_client);
//! let greeted = ClientHandshake::new().advance(&mut to_client, &mut to_server)?;
//! let ClientStep::Newstyle(phase) = greeted else { panic!("an old server, or half a greeting") };
//! let awaiting = phase.go("disk", InfoRequest::default(), &mut to_server)?;
//! let asked = server.advance(&mut to_server, &mut to_client)?;
//! let HandshakeStep::Go(go) = asked else { panic!("another option") };
//! let export = ExportDescription::new(go.export_name(), disk.len() as u64);
//! let GoAnswer::Transmission(of_server) = go.accept(&export, &mut to_client) else { panic!() };
//! let answered = awaiting.advance(&mut to_client)?;
//! let AwaitStep::Accepted(accepted) = answered else { panic!("refused") };
//! let (of_client, _) = *accepted;
//! assert_eq!(of_client.size, 20);
//!
//! // The transmission: any number of requests may be in flight; a cookie identifies each.
//! let mut client = client::Transmission::new(&of_client);
//! let read = Command::Read(Fragmentation::Allowed);
//! let cookie = client.request(2, 4, &read, &mut to_server)?;
//!
//! let parsed = server::Transmission::new(&of_server).parse(&to_server)?;
//! let Parsed::Request { request, consumed } = parsed else { panic!("malformed, or a part") };
//! to_server.advance(consumed);
//! let (offset, length) = (request.offset as usize, request.length as u32);
//! let replies = ReplyEncoder::new(of_server.reply_mode);
//! replies.data_header(request.tag(), request.offset, length, Position::Last, &mut to_client);
//! to_client.extend_from_slice(&disk[offset..][..length as usize]);
//!
//! let told = client.advance(&mut to_client)?;
//! assert_eq!(told, Event::Data { cookie, position: 0, length: 4 });
//! // The data itself stays in the buffer, for the caller to take.
//! assert_eq!(to_client.split_to(4), "disk");
//! assert_eq!(client.advance(&mut to_client)?, Event::Finished { cookie, result: Ok(()) });
//! # Ok(())
//! # }
//! ```

pub mod codec;
pub mod error;
pub mod handshake;
pub mod host_lookup;
pub mod limits;
pub mod system_words;
pub mod tls;
pub mod transmission;
pub mod uri;
pub mod wire;

pub use error::{ApiMisuse, ProtocolError};
pub use uri::NbdUri;
