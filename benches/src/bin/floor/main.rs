//! The floor of the benchmark: a server that answers every read from a constant buffer.
//!
//! It implements just enough of the protocol (fixed newstyle, simple replies, read-only) for fio
//! and nbdcopy. It does the least work that any server has to do: one system call for all waiting
//! requests, and one for all their answers. Its time is the cost of the socket and of the client;
//! the additional time of another server is that server's own cost.
//!
//! `floor --socket PATH --size BYTES` serves until it is killed. `--file FILE` behind it answers
//! from a file instead, with a system call for each read; `--qcow2 FILE` from an image, without a
//! cache of tables.

mod qcow2;

use std::env;
use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use qcow2::Qcow2;

/// Bytes of requests that one read takes: more than any client here keeps in flight.
const RECEIVE_BYTES: usize = 256 << 10;
/// The constant data of every answer. Longer reads get it repeatedly.
const CONSTANT_BYTES: usize = 256 << 10;
/// The longest read that is answered: what clients assume without a BLOCK_SIZE information.
const MAXIMUM_READ_BYTES: u32 = 32 << 20;
/// The longest option payload. Names have at most 4096 bytes.
const MAXIMUM_OPTION_BYTES: usize = 64 << 10;
/// Pieces in one gathered write (IOV_MAX on Linux).
const MAXIMUM_PIECES: usize = 1024;

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
const TRANSMISSION_FLAGS: u16 = 1 | 1 << 1 | 1 << 8; // HAS_FLAGS, READ_ONLY, CAN_MULTI_CONN
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REQUEST_BYTES: usize = 28;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const SIMPLE_REPLY_BYTES: usize = 16;
const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DISCONNECT: u16 = 2;
const ERROR_INVALID: u32 = 22;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("floor: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (socket, size, source) = match arguments[..] {
        ["--socket", socket, "--size", size] => (socket, size, Source::constant()),
        ["--socket", socket, "--size", size, "--file", file] => {
            (socket, size, Source::File(File::open(file)?))
        }
        ["--socket", socket, "--size", size, "--qcow2", file] => {
            (socket, size, Source::Qcow2(Qcow2::open(Path::new(file))?))
        }
        _ => return Err(usage()),
    };
    let size: u64 = size.parse().map_err(|_| usage())?;
    let source = Arc::new(source);
    let listener = UnixListener::bind(socket)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot bind {socket}: {error}")))?;
    for stream in listener.incoming() {
        let (stream, source) = (stream?, Arc::clone(&source));
        thread::spawn(move || {
            // A client that disconnects in the middle, like a probe, is not worth a message.
            if let Err(error) = serve(stream, size, &source)
                && error.kind() != ErrorKind::UnexpectedEof
                && error.kind() != ErrorKind::BrokenPipe
            {
                eprintln!("floor: {error}");
            }
        });
    }
    Ok(())
}

fn usage() -> io::Error {
    io::Error::new(
        ErrorKind::InvalidInput,
        "usage: floor --socket PATH --size BYTES [--file FILE | --qcow2 FILE]",
    )
}

fn bad(what: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

/// What is read.
enum Source {
    Constant(Vec<u8>),
    File(File),
    Qcow2(Qcow2),
}

impl Source {
    fn constant() -> Self {
        Self::Constant(vec![0x5a; CONSTANT_BYTES])
    }
}

fn serve(mut stream: UnixStream, size: u64, source: &Source) -> io::Result<()> {
    if negotiate(&mut stream, size)? { transmit(&mut stream, size, source) } else { Ok(()) }
}

/// Performs the handshake; returns whether transmission follows.
fn negotiate(stream: &mut UnixStream, size: u64) -> io::Result<bool> {
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
                answer.extend(TRANSMISSION_FLAGS.to_be_bytes());
                if client_flags & CLIENT_NO_ZEROES == 0 {
                    answer.extend([0; 124]);
                }
            }
            OPTION_INFO | OPTION_GO => {
                let mut information = Vec::new();
                information.extend(INFO_EXPORT.to_be_bytes());
                information.extend(size.to_be_bytes());
                information.extend(TRANSMISSION_FLAGS.to_be_bytes());
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

fn read_array<const N: usize>(stream: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Answers requests until the client sends DISC.
fn transmit(stream: &mut UnixStream, size: u64, source: &Source) -> io::Result<()> {
    let mut data = Vec::new();
    let mut received = vec![0; RECEIVE_BYTES];
    let mut filled = 0;
    let mut replies = Vec::new();
    loop {
        let count = stream.read(&mut received[filled..])?;
        if count == 0 {
            return Ok(());
        }
        filled += count;
        replies.clear();
        let whole = filled - filled % REQUEST_BYTES;
        let mut is_over = false;
        for request in received[..whole].chunks_exact(REQUEST_BYTES) {
            match answer(request, size)? {
                Some(reply) => replies.push(reply),
                None => is_over = true,
            }
        }
        let payloads = match source {
            Source::Constant(constant) => constant,
            Source::File(file) => {
                let read = |offset, data: &mut [u8]| file.read_exact_at(data, offset);
                read_all(read, &mut replies, &mut data)?;
                &data
            }
            Source::Qcow2(image) => {
                let read = |offset, data: &mut [u8]| image.read(offset, data);
                read_all(read, &mut replies, &mut data)?;
                &data
            }
        };
        send(stream, &replies, payloads)?;
        if is_over {
            return Ok(());
        }
        received.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

/// A reply's header, and the bytes that follow it.
struct Reply {
    header: [u8; SIMPLE_REPLY_BYTES],
    /// On the disk.
    offset: u64,
    /// Where they are in the payloads, which repeat if they are shorter.
    start: usize,
    payload_length: usize,
}

/// The reply to the request of 28 bytes; `None` for DISC.
fn answer(request: &[u8], size: u64) -> io::Result<Option<Reply>> {
    if number(&request[..4]) != u64::from(REQUEST_MAGIC) {
        return Err(bad("the client sent a wrong request magic"));
    }
    let command = number(&request[6..8]) as u16;
    let offset = number(&request[16..24]);
    let length = number(&request[24..28]) as u32;
    if command == COMMAND_DISCONNECT {
        return Ok(None);
    }
    if command == COMMAND_WRITE {
        return Err(bad("the client writes to a read-only disk"));
    }
    let is_inside = offset.checked_add(u64::from(length)).is_some_and(|end| end <= size);
    let is_read = command == COMMAND_READ && is_inside && length <= MAXIMUM_READ_BYTES;
    let error = if is_read { 0 } else { ERROR_INVALID };
    let mut header = [0; SIMPLE_REPLY_BYTES];
    header[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    header[4..8].copy_from_slice(&error.to_be_bytes());
    header[8..].copy_from_slice(&request[8..16]);
    let payload_length = if is_read { length as usize } else { 0 };
    Ok(Some(Reply { header, offset, start: 0, payload_length }))
}

/// Reads what the replies ask for into `data`, one behind the other.
fn read_all(
    read: impl Fn(u64, &mut [u8]) -> io::Result<()>,
    replies: &mut [Reply],
    data: &mut Vec<u8>,
) -> io::Result<()> {
    let mut end = 0;
    for reply in replies {
        reply.start = end;
        end += reply.payload_length;
        if data.len() < end {
            data.resize(end, 0);
        }
        read(reply.offset, &mut data[reply.start..end])?;
    }
    Ok(())
}

/// The big-endian number in at most 8 bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Writes all replies with gathered writes.
fn send(stream: &mut UnixStream, replies: &[Reply], payloads: &[u8]) -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(REQUEST_MAGIC.to_be_bytes());
        bytes.extend([0, 0]);
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes
    }

    /// A client that went through the handshake with GO.
    fn connect(size: u64) -> UnixStream {
        let (mut client, server) = UnixStream::pair().expect("socket pair");
        thread::spawn(move || serve(server, size, &Source::constant()));
        let greeting: [u8; 18] = read_array(&mut client).expect("greeting");
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        let mut hello = vec![0, 0, 0, 3];
        hello.extend(b"IHAVEOPT");
        hello.extend([0, 0, 0, 7, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0]);
        client.write_all(&hello).expect("sent");
        let replies: [u8; 20 + 12 + 20] = read_array(&mut client).expect("information and ack");
        assert_eq!(replies[22..30], size.to_be_bytes());
        client
    }

    #[test]
    fn reads_are_answered_in_order_with_the_constant() {
        let mut client = connect(1 << 30);
        let mut requests = request(COMMAND_READ, 7, 0, 5);
        requests.extend(request(COMMAND_READ, 8, 4096, 300 << 10));
        client.write_all(&requests).expect("sent");
        for (cookie, length) in [(7_u64, 5), (8, 300 << 10)] {
            let header: [u8; 16] = read_array(&mut client).expect("header");
            assert_eq!(header[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
            assert_eq!(header[8..], cookie.to_be_bytes());
            let mut payload = vec![0; length];
            client.read_exact(&mut payload).expect("payload");
            assert!(payload.iter().all(|byte| *byte == 0x5a));
        }
    }

    #[test]
    fn requests_may_arrive_in_pieces() {
        let mut client = connect(1 << 20);
        for byte in request(COMMAND_READ, 1, 0, 1) {
            client.write_all(&[byte]).expect("sent");
        }
        let reply: [u8; 17] = read_array(&mut client).expect("reply");
        assert_eq!(reply[16], 0x5a);
    }

    #[test]
    fn reads_past_the_end_are_refused_and_goodbye_ends() {
        let mut client = connect(1 << 20);
        client.write_all(&request(COMMAND_READ, 1, 1 << 20, 1)).expect("sent");
        let reply: [u8; 16] = read_array(&mut client).expect("reply");
        assert_eq!(reply[4..8], ERROR_INVALID.to_be_bytes());
        client.write_all(&request(COMMAND_READ, 2, u64::MAX, 1)).expect("sent");
        let reply: [u8; 16] = read_array(&mut client).expect("reply");
        assert_eq!(reply[4..8], ERROR_INVALID.to_be_bytes());
        client.write_all(&request(COMMAND_DISCONNECT, 3, 0, 0)).expect("sent");
        assert_eq!(client.read(&mut [0]).expect("end of stream"), 0);
    }
}
