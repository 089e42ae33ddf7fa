//! A minimal client: simple replies, one request at a time, and raw bytes.
//!
//! It shares no code with the crates under test.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_LIST_META_CONTEXT: u32 = 9;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;

pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_FLUSH: u16 = 3;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_CACHE: u16 = 5;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;
pub(super) const CMD_BLOCK_STATUS: u16 = 7;

const REP_ACK: u32 = 1;

/// A reply that takes longer is considered hung.
const PATIENCE: Duration = Duration::from_secs(60);

/// An option and its data.
pub(super) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The data of INFO and GO without information requests.
pub(super) fn go(export: &str) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend([0, 0]);
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT with one query.
pub(super) fn meta_context(export: &str, query: &str) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend(1_u32.to_be_bytes());
    data.extend((query.len() as u32).to_be_bytes());
    data.extend(query.as_bytes());
    data
}

/// The header of a request.
pub(super) fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// A connection.
#[derive(Debug)]
pub(super) struct Wire {
    stream: UnixStream,
    cookie: u64,
}

impl Wire {
    /// Connects, and answers the greeting.
    ///
    /// # Errors
    ///
    /// The server cannot be reached, or its greeting is not newstyle.
    pub(super) fn greet(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).context("cannot connect")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut wire = Self { stream, cookie: 0 };
        let greeting: [u8; 18] = wire.receive()?;
        if !greeting.starts_with(b"NBDMAGICIHAVEOPT") {
            bail!("this is not the greeting of a server: {greeting:?}");
        }
        wire.send(&3_u32.to_be_bytes())?;
        Ok(wire)
    }

    /// Connects to an export.
    ///
    /// # Errors
    ///
    /// As for [`Wire::greet`], or the export is refused.
    pub(super) fn connect(socket: &Path, export: &str) -> Result<Self> {
        let mut wire = Self::greet(socket)?;
        wire.negotiate(OPT_GO, &go(export))?;
        Ok(wire)
    }

    /// Sends an option and waits for its end.
    ///
    /// # Errors
    ///
    /// The option is refused.
    pub(super) fn negotiate(&mut self, number: u32, data: &[u8]) -> Result<()> {
        self.send(&option(number, data))?;
        loop {
            let _: [u8; 12] = self.receive()?;
            let kind = u32::from_be_bytes(self.receive()?);
            let length = u32::from_be_bytes(self.receive()?);
            let mut text = vec![0; length.min(1 << 20) as usize];
            self.stream.read_exact(&mut text)?;
            match kind {
                REP_ACK => return Ok(()),
                kind if kind >> 31 == 1 => {
                    bail!("option {number}: {kind:#x}: {}", String::from_utf8_lossy(&text));
                }
                _ => {}
            }
        }
    }

    /// Sends bytes unchanged.
    ///
    /// # Errors
    ///
    /// The server has closed the connection, or reads nothing.
    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Sends what the server accepts without blocking; returns the number of bytes.
    pub(super) fn send_some(&mut self, bytes: &[u8]) -> usize {
        self.stream.set_nonblocking(true).ok();
        let mut sent = 0;
        while let Ok(count @ 1..) = self.stream.write(&bytes[sent..]) {
            sent += count;
        }
        self.stream.set_nonblocking(false).ok();
        sent
    }

    fn receive<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Sends one request and reads its reply; returns the error of the reply, or 0.
    ///
    /// # Errors
    ///
    /// The connection broke, or the reply is malformed.
    pub(super) fn exchange(&mut self, request: &[u8], answer: &mut [u8]) -> Result<u32> {
        let cookie = self.cookie;
        self.send(request)?;
        let magic = u32::from_be_bytes(self.receive()?);
        let error = u32::from_be_bytes(self.receive()?);
        let found = u64::from_be_bytes(self.receive()?);
        if magic != SIMPLE_REPLY_MAGIC || found != cookie {
            bail!("reply {magic:#x} to {found} where {cookie} was asked");
        }
        if error == 0 {
            self.stream.read_exact(answer)?;
        }
        Ok(error)
    }

    fn header(&mut self, command: u16, offset: u64, length: u32) -> Vec<u8> {
        self.cookie += 1;
        request(command, 0, self.cookie, offset, length)
    }

    /// READ.
    ///
    /// # Errors
    ///
    /// As for [`Wire::exchange`], or the read fails.
    pub(super) fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0xee; length];
        let request = self.header(CMD_READ, offset, length as u32);
        match self.exchange(&request, &mut bytes)? {
            0 => Ok(bytes),
            error => bail!("reading {length} bytes at {offset}: error {error}"),
        }
    }

    /// WRITE; returns the error of the reply.
    ///
    /// # Errors
    ///
    /// As for [`Wire::exchange`].
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<u32> {
        let mut request = self.header(CMD_WRITE, offset, bytes.len() as u32);
        request.extend(bytes);
        self.exchange(&request, &mut [])
    }

    /// A command without data; returns the error of the reply.
    ///
    /// # Errors
    ///
    /// As for [`Wire::exchange`].
    pub(super) fn command(&mut self, command: u16, offset: u64, length: u32) -> Result<u32> {
        let request = self.header(command, offset, length);
        self.exchange(&request, &mut [])
    }
}
