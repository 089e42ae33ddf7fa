//! As much of the protocol as fio, nbdcopy and `nbd-cli bench` need: fixed newstyle and simple
//! replies.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::unix::net::UnixStream;

// "Protocol negotiation" in the specification.
const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const HANDSHAKE_FLAGS: u16 = 0b11; // FIXED_NEWSTYLE, NO_ZEROES
const CLIENT_NO_ZEROES: u32 = 0b10;
const OPTION_EXPORT_NAME: u32 = 1;
const OPTION_ABORT: u32 = 2;
const OPTION_INFO: u32 = 6;
const OPTION_GO: u32 = 7;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_UNSUPPORTED: u32 = 0x8000_0001;
const INFO_EXPORT: u16 = 0;

// "Transmission" in the specification.
/// HAS_FLAGS, READ_ONLY and CAN_MULTI_CONN.
pub(crate) const FLAGS_READ_ONLY: u16 = 1 | 1 << 1 | 1 << 8;
/// HAS_FLAGS, SEND_FLUSH, SEND_FUA and CAN_MULTI_CONN.
pub(crate) const FLAGS_WRITABLE: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 8;
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const REQUEST_BYTES: usize = 28;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const SIMPLE_REPLY_BYTES: usize = 16;
pub(crate) const COMMAND_READ: u16 = 0;
pub(crate) const COMMAND_WRITE: u16 = 1;
pub(crate) const COMMAND_DISCONNECT: u16 = 2;
pub(crate) const COMMAND_FLUSH: u16 = 3;
pub(crate) const COMMAND_FLAG_FUA: u16 = 1;
pub(crate) const ERROR_IO: u32 = 5;
pub(crate) const ERROR_INVALID: u32 = 22;

/// The longest read that is answered: what clients assume without a BLOCK_SIZE information.
const MAXIMUM_READ_BYTES: u32 = 32 << 20;
/// The longest option payload. Names have at most 4096 bytes.
const MAXIMUM_OPTION_BYTES: usize = 64 << 10;
/// Pieces in one gathered write (IOV_MAX on Linux).
const MAXIMUM_PIECES: usize = 1024;

pub(crate) fn bad(what: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

/// Performs the handshake, with these transmission flags; returns whether transmission follows.
pub(crate) fn negotiate(stream: &mut UnixStream, size: u64, flags: u16) -> io::Result<bool> {
    let mut greeting = Vec::new();
    greeting.extend(NBDMAGIC.to_be_bytes());
    greeting.extend(IHAVEOPT.to_be_bytes());
    greeting.extend(HANDSHAKE_FLAGS.to_be_bytes());
    stream.write_all(&greeting)?;
    let client_flags = u32::from_be_bytes(read_array(stream)?);
    loop {
        if u64::from_be_bytes(read_array(stream)?) != IHAVEOPT {
            return Err(bad("the client sent a wrong option magic"));
        }
        let option = u32::from_be_bytes(read_array(stream)?);
        let length = u32::from_be_bytes(read_array(stream)?) as usize;
        if length > MAXIMUM_OPTION_BYTES {
            return Err(bad("the client sent an option that is too long"));
        }
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload)?;
        let mut answer = Vec::new();
        match option {
            OPTION_EXPORT_NAME => {
                answer.extend(size.to_be_bytes());
                answer.extend(flags.to_be_bytes());
                if client_flags & CLIENT_NO_ZEROES == 0 {
                    answer.extend([0; 124]);
                }
            }
            OPTION_INFO | OPTION_GO => {
                let mut information = Vec::new();
                information.extend(INFO_EXPORT.to_be_bytes());
                information.extend(size.to_be_bytes());
                information.extend(flags.to_be_bytes());
                push_option_reply(&mut answer, option, REPLY_INFO, &information);
                push_option_reply(&mut answer, option, REPLY_ACK, &[]);
            }
            OPTION_ABORT => push_option_reply(&mut answer, option, REPLY_ACK, &[]),
            // Structured replies are among them: simple replies are shorter.
            _ => push_option_reply(&mut answer, option, REPLY_UNSUPPORTED, &[]),
        }
        stream.write_all(&answer)?;
        match option {
            OPTION_EXPORT_NAME | OPTION_GO => return Ok(true),
            OPTION_ABORT => return Ok(false),
            _ => {}
        }
    }
}

fn push_option_reply(answer: &mut Vec<u8>, option: u32, reply: u32, payload: &[u8]) {
    answer.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    answer.extend(option.to_be_bytes());
    answer.extend(reply.to_be_bytes());
    // Every payload is a few constant bytes.
    answer.extend((payload.len() as u32).to_be_bytes());
    answer.extend(payload);
}

pub(crate) fn read_array<const N: usize>(stream: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// A request without its payload.
#[derive(Clone, Copy)]
pub(crate) struct Request {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: [u8; 8],
    pub(crate) offset: u64,
    pub(crate) length: u32,
}

impl Request {
    pub(crate) fn parse(bytes: &[u8; REQUEST_BYTES]) -> io::Result<Self> {
        if number(&bytes[..4]) != u64::from(REQUEST_MAGIC) {
            return Err(bad("the client sent a wrong request magic"));
        }
        let mut cookie = [0; 8];
        cookie.copy_from_slice(&bytes[8..16]);
        Ok(Self {
            flags: number(&bytes[4..6]) as u16,
            command: number(&bytes[6..8]) as u16,
            cookie,
            offset: number(&bytes[16..24]),
            length: number(&bytes[24..28]) as u32,
        })
    }

    /// Whether it is about bytes of a disk of `size` bytes.
    pub(crate) fn is_inside(&self, size: u64) -> bool {
        self.offset.checked_add(u64::from(self.length)).is_some_and(|end| end <= size)
    }
}

/// A reply's header, and the bytes that follow it.
pub(crate) struct Reply {
    header: [u8; SIMPLE_REPLY_BYTES],
    /// On the disk.
    pub(crate) offset: u64,
    /// Where they are in the payloads, which repeat if they are shorter.
    pub(crate) start: usize,
    pub(crate) payload_length: usize,
}

impl Reply {
    pub(crate) fn new(request: &Request, error: u32, start: usize, payload_length: usize) -> Self {
        let mut header = [0; SIMPLE_REPLY_BYTES];
        header[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        header[4..8].copy_from_slice(&error.to_be_bytes());
        header[8..].copy_from_slice(&request.cookie);
        Self { header, offset: request.offset, start, payload_length }
    }
}

/// The reply to a request to a disk that is only read; `None` for DISC.
pub(crate) fn answer(request: &Request, size: u64) -> io::Result<Option<Reply>> {
    match request.command {
        COMMAND_DISCONNECT => Ok(None),
        COMMAND_WRITE => Err(bad("the client writes to a read-only disk")),
        COMMAND_READ if request.is_inside(size) && request.length <= MAXIMUM_READ_BYTES => {
            Ok(Some(Reply::new(request, 0, 0, request.length as usize)))
        }
        _ => Ok(Some(Reply::new(request, ERROR_INVALID, 0, 0))),
    }
}

/// The big-endian number in at most 8 bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Writes all replies with gathered writes.
pub(crate) fn send(stream: &mut UnixStream, replies: &[Reply], payloads: &[u8]) -> io::Result<()> {
    let mut pieces = Vec::new();
    for reply in replies {
        pieces.push(IoSlice::new(&reply.header));
        let mut left = reply.payload_length;
        while left > 0 {
            let rest = &payloads[reply.start..];
            let piece = &rest[..left.min(rest.len())];
            pieces.push(IoSlice::new(piece));
            left -= piece.len();
        }
    }
    let mut rest = pieces.as_mut_slice();
    while !rest.is_empty() {
        let count = rest.len().min(MAXIMUM_PIECES);
        match stream.write_vectored(&rest[..count]) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut rest, written),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
