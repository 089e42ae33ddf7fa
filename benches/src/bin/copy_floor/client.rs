//! As much of the protocol as a copy needs, spoken to nbdkit: fixed newstyle, replies to reads in
//! one chunk, and all options sent at once.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::sockopt::set_socket_send_buffer_size;

// "Protocol negotiation" in the specification.
const GREETING_BYTES: usize = 18;
const CLIENT_FLAGS: u32 = 0b11; // FIXED_NEWSTYLE, NO_ZEROES
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED_REPLY: u32 = 8;
const OPTION_SET_META_CONTEXT: u32 = 10;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_META_CONTEXT: u32 = 4;
const INFO_EXPORT: &[u8] = &[0, 0];
const ALLOCATION: &[u8] = b"base:allocation";

// "Transmission" in the specification.
const REQUEST_MAGIC: u32 = 0x2560_9513;
const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DISCONNECT: u16 = 2;
const COMMAND_BLOCK_STATUS: u16 = 7;
const SIMPLE_REPLY: &[u8] = &[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]; // no error
/// The magic number, DONE, and the type.
const OFFSET_DATA_CHUNK: &[u8] = &[0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1];
const BLOCK_STATUS_CHUNK: &[u8] = &[0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 5];
/// The status flag of what reads as zero.
const STATE_ZERO: u32 = 0b10;
/// The longest range of one BLOCK_STATUS, in whole MiB.
const LONGEST_STATUS: u64 = 0xfff0_0000;

/// What the socket takes before the server receives it: more than one request.
const BUFFER_BYTES: usize = 512 << 10;

pub(crate) struct Client {
    stream: UnixStream,
    size: u64,
    /// Requests that are not sent yet.
    asked: Vec<u8>,
    /// Writes that are not answered yet.
    unanswered: usize,
}

impl Client {
    pub(crate) fn connect_to_read(socket: &Path) -> io::Result<Self> {
        let mut contexts = string(b"");
        contexts.extend(1_u32.to_be_bytes());
        contexts.extend(string(ALLOCATION));
        let mut options = option(OPTION_STRUCTURED_REPLY, &[]);
        options.extend(option(OPTION_SET_META_CONTEXT, &contexts));
        Self::connect(socket, options)
    }

    pub(crate) fn connect_to_write(socket: &Path) -> io::Result<Self> {
        Self::connect(socket, Vec::new())
    }

    fn connect(socket: &Path, options: Vec<u8>) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        set_socket_send_buffer_size(&stream, BUFFER_BYTES)?;
        let mut sent = CLIENT_FLAGS.to_be_bytes().to_vec();
        sent.extend(options);
        let no_information = [string(b""), vec![0, 0]].concat();
        sent.extend(option(OPTION_GO, &no_information));
        stream.read_exact(&mut [0; GREETING_BYTES])?;
        stream.write_all(&sent)?;
        let mut size = 0;
        loop {
            let header: [u8; 20] = read_array(&mut stream)?;
            let (option, reply) = (number(&header[8..12]) as u32, number(&header[12..16]) as u32);
            let mut payload = vec![0; number(&header[16..]) as usize];
            stream.read_exact(&mut payload)?;
            match (option, reply) {
                _ if number(&header[..8]) != OPTION_REPLY_MAGIC => return Err(unexpected()),
                (OPTION_GO, REPLY_ACK) => break,
                (OPTION_GO, REPLY_INFO) if payload.starts_with(INFO_EXPORT) => {
                    size = number(payload.get(2..10).ok_or_else(unexpected)?);
                }
                (_, REPLY_ACK | REPLY_INFO | REPLY_META_CONTEXT) => {}
                _ => return Err(unexpected()),
            }
        }
        Ok(Self { stream, size, asked: Vec::new(), unanswered: 0 })
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// The extents of the complete disk that have data.
    pub(crate) fn data(&mut self) -> io::Result<Vec<Range<u64>>> {
        let (mut extents, mut at) = (Vec::<Range<u64>>::new(), 0);
        while at < self.size {
            let longest = LONGEST_STATUS.min(self.size - at) as u32;
            self.stream.write_all(&request(COMMAND_BLOCK_STATUS, at, longest))?;
            let mut descriptors = vec![0; self.chunk(BLOCK_STATUS_CHUNK)?];
            self.stream.read_exact(&mut descriptors)?;
            // The first four bytes are the number of the context.
            for descriptor in descriptors.get(4..).ok_or_else(unexpected)?.chunks_exact(8) {
                let end = at + number(&descriptor[..4]);
                if number(&descriptor[4..]) as u32 & STATE_ZERO == 0 {
                    extents.push(at..end);
                }
                at = end;
            }
        }
        Ok(extents)
    }

    /// Asks for a piece, when the next one is received.
    pub(crate) fn ask(&mut self, piece: &Range<u64>) {
        let length = (piece.end - piece.start) as u32;
        self.asked.extend(request(COMMAND_READ, piece.start, length));
    }

    /// Receives a piece; returns which.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Range<u64>> {
        if !self.asked.is_empty() {
            self.stream.write_all(&self.asked)?;
            self.asked.clear();
        }
        let length = self.chunk(OFFSET_DATA_CHUNK)?;
        let offset = u64::from_be_bytes(read_array(&mut self.stream)?);
        let data = buffer.get_mut(..length - 8).ok_or_else(unexpected)?;
        self.stream.read_exact(data)?;
        Ok(offset..offset + data.len() as u64)
    }

    /// Takes the header of a chunk that is a complete reply; returns the length of its payload.
    fn chunk(&mut self, kind: &[u8]) -> io::Result<usize> {
        let header: [u8; 20] = read_array(&mut self.stream)?;
        let length = number(&header[16..]) as usize;
        if !header.starts_with(kind) || length < 8 { Err(unexpected()) } else { Ok(length) }
    }

    /// Writes, after waiting until fewer than `most` writes are unanswered.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8], most: usize) -> io::Result<()> {
        self.wait(most - 1)?;
        let header = request(COMMAND_WRITE, offset, data.len() as u32);
        let mut parts = &mut [IoSlice::new(&header), IoSlice::new(data)][..];
        while !parts.is_empty() {
            match self.stream.write_vectored(parts)? {
                0 => return Err(ErrorKind::WriteZero.into()),
                written => IoSlice::advance_slices(&mut parts, written),
            }
        }
        self.unanswered += 1;
        Ok(())
    }

    /// Waits until at most `most` writes are unanswered.
    pub(crate) fn wait(&mut self, most: usize) -> io::Result<()> {
        while self.unanswered > most {
            let reply: [u8; 16] = read_array(&mut self.stream)?;
            if !reply.starts_with(SIMPLE_REPLY) {
                return Err(unexpected());
            }
            self.unanswered -= 1;
        }
        Ok(())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The server notices the end of the connection as well.
        drop(self.stream.write_all(&request(COMMAND_DISCONNECT, 0, 0)));
    }
}

fn unexpected() -> io::Error {
    io::Error::new(ErrorKind::InvalidData, "the server sent something else than expected")
}

fn read_array<const N: usize>(stream: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The big-endian number in at most 8 bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// A string with its length in front.
fn string(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes(), bytes].concat()
}

fn option(option: u32, payload: &[u8]) -> Vec<u8> {
    [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &string(payload)].concat()
}

/// A request whose cookie is its offset.
fn request(command: u16, offset: u64, length: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[6..8].copy_from_slice(&command.to_be_bytes());
    bytes[8..16].copy_from_slice(&offset.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}
