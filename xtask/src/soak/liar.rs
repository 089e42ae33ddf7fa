//! A server that speaks the protocol and occasionally lies.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::random::Random;
use super::wire::{
    CMD_BLOCK_STATUS, CMD_READ, CMD_WRITE, OPT_EXPORT_NAME, OPT_GO, OPT_INFO, OPT_LIST,
    OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, OPTION_MAGIC, REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
};

/// The size of the export in bytes.
pub(super) const SIZE: u64 = 3 << 20;
const CONTEXT: &[u8] = b"base:allocation";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const REP_ERR_UNSUP: u32 = 0x8000_0001;
/// HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF, CAN_MULTI_CONN.
const FLAGS: u16 = 0b1_1110_1101;

/// The content of the export: every other 64 KiB are zero.
pub(super) fn content(offset: u64, length: usize) -> Vec<u8> {
    let byte = |at: u64| if at >> 16 & 1 == 1 { 0 } else { (at / 511 % 255) as u8 + 1 };
    (offset..offset + length as u64).map(byte).collect()
}

/// The record of a liar's actions.
#[derive(Debug, Default)]
pub(super) struct Lied {
    /// A violation of the protocol.
    pub(super) at_all: AtomicBool,
}

/// One connection of a liar.
pub(super) struct Liar<'a> {
    stream: UnixStream,
    random: Random,
    lied: &'a Lied,
    /// One lie in this many messages; none if 0.
    rarity: u64,
    is_structured: bool,
    has_context: bool,
}

impl<'a> Liar<'a> {
    pub(super) fn new(stream: UnixStream, random: Random, rarity: u64, lied: &'a Lied) -> Self {
        Self { stream, random, lied, rarity, is_structured: false, has_context: false }
    }

    /// Serves until the client leaves or a lie ends it.
    ///
    /// # Errors
    ///
    /// The connection is over.
    pub(super) fn serve(mut self) -> io::Result<()> {
        self.stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        self.stream.set_write_timeout(Some(Duration::from_secs(5)))?;
        self.say(b"NBDMAGICIHAVEOPT\0\x03".to_vec(), &[])?;
        let _: [u8; 4] = self.hear()?;
        while !self.option()? {}
        loop {
            self.request()?;
        }
    }

    /// Sends a message, or a lie. Lies change headers, lengths and order, never the bytes of the
    /// disk.
    fn say(&mut self, mut header: Vec<u8>, payload: &[u8]) -> io::Result<()> {
        if self.rarity != 0 && self.random.one_in(self.rarity) {
            self.lied.at_all.store(true, Ordering::SeqCst);
            let at = self.random.below(header.len() as u64) as usize;
            match self.random.below(8) {
                0 => header[at] ^= 1 << self.random.below(8),
                1 => header[at] = self.random.next() as u8,
                2 => header.truncate(at),
                3 => self.stream.write_all(&header)?,
                4 => {
                    for _ in 0..self.random.below(3000) {
                        self.stream.write_all(&header)?;
                    }
                }
                5 => header.extend(vec![0x55; self.random.below(5000) as usize]),
                6 => std::thread::sleep(Duration::from_millis(self.random.below(8000))),
                _ => return Err(io::ErrorKind::ConnectionAborted.into()),
            }
        }
        header.extend(payload);
        self.stream.write_all(&header)
    }

    fn hear<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn hear_payload(&mut self, length: u32) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length.min(64 << 20) as usize];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut header = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        header.extend(option.to_be_bytes());
        header.extend(kind.to_be_bytes());
        header.extend((data.len() as u32).to_be_bytes());
        header.extend(data);
        self.say(header, &[])
    }

    /// Answers an option; returns true when transmission begins.
    fn option(&mut self) -> io::Result<bool> {
        if u64::from_be_bytes(self.hear()?) != OPTION_MAGIC {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let option = u32::from_be_bytes(self.hear()?);
        let length = u32::from_be_bytes(self.hear()?);
        self.hear_payload(length)?;
        match option {
            OPT_EXPORT_NAME => {
                let mut bytes = SIZE.to_be_bytes().to_vec();
                bytes.extend(FLAGS.to_be_bytes());
                self.say(bytes, &[])?;
                return Ok(true);
            }
            OPT_STRUCTURED_REPLY => self.is_structured = true,
            OPT_LIST => self.reply(option, REP_SERVER, &[0, 0, 0, 1, b'd'])?,
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => {
                self.has_context = true;
                let data = [&7_u32.to_be_bytes()[..], CONTEXT].concat();
                self.reply(option, REP_META_CONTEXT, &data)?;
            }
            OPT_INFO | OPT_GO => {
                let mut data = vec![0, 0];
                data.extend(SIZE.to_be_bytes());
                data.extend(FLAGS.to_be_bytes());
                self.reply(option, REP_INFO, &data)?;
            }
            _ => {
                self.reply(option, REP_ERR_UNSUP, b"not here")?;
                return Ok(false);
            }
        }
        self.reply(option, REP_ACK, &[])?;
        Ok(option == OPT_GO)
    }

    fn request(&mut self) -> io::Result<()> {
        if u32::from_be_bytes(self.hear()?) != REQUEST_MAGIC {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let _flags: [u8; 2] = self.hear()?;
        let command = u16::from_be_bytes(self.hear()?);
        let cookie: [u8; 8] = self.hear()?;
        let offset = u64::from_be_bytes(self.hear()?);
        let length = u32::from_be_bytes(self.hear()?);
        match command {
            CMD_READ => self.read(cookie, offset, length),
            CMD_WRITE => {
                self.hear_payload(length)?;
                self.done(cookie)
            }
            CMD_BLOCK_STATUS => self.block_status(cookie, offset, length),
            2 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => self.done(cookie),
        }
    }

    fn done(&mut self, cookie: [u8; 8]) -> io::Result<()> {
        if self.is_structured {
            return self.chunk(cookie, 1, 0, &[], &[]);
        }
        let mut header = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(cookie);
        self.say(header, &[])
    }

    fn chunk(
        &mut self,
        cookie: [u8; 8],
        flags: u16,
        kind: u16,
        head: &[u8],
        payload: &[u8],
    ) -> io::Result<()> {
        let mut header = STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
        header.extend(flags.to_be_bytes());
        header.extend(kind.to_be_bytes());
        header.extend(cookie);
        header.extend(((head.len() + payload.len()) as u32).to_be_bytes());
        header.extend(head);
        self.say(header, payload)
    }

    fn read(&mut self, cookie: [u8; 8], offset: u64, length: u32) -> io::Result<()> {
        let end = offset.saturating_add(u64::from(length)).min(SIZE);
        let bytes = content(offset.min(end), (end - offset.min(end)) as usize);
        if !self.is_structured {
            let mut header = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
            header.extend([0; 4]);
            header.extend(cookie);
            return self.say(header, &bytes);
        }
        let middle = self.random.below(bytes.len() as u64 + 1) as usize;
        for (start, part, is_last) in [(0, &bytes[..middle], 0), (middle, &bytes[middle..], 1)] {
            let place = (offset + start as u64).to_be_bytes();
            if part.is_empty() {
                self.chunk(cookie, is_last, 0, &[], &[])?;
            } else if part.iter().all(|byte| *byte == 0) {
                let head = [&place[..], &(part.len() as u32).to_be_bytes()].concat();
                self.chunk(cookie, is_last, 2, &head, &[])?;
            } else {
                self.chunk(cookie, is_last, 1, &place, part)?;
            }
        }
        Ok(())
    }

    fn block_status(&mut self, cookie: [u8; 8], offset: u64, length: u32) -> io::Result<()> {
        if !self.has_context {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut data = 7_u32.to_be_bytes().to_vec();
        let (mut at, end) = (offset, offset.saturating_add(u64::from(length)).min(SIZE));
        while at < end {
            let next = (((at >> 16) + 1) << 16).min(end);
            data.extend(((next - at) as u32).to_be_bytes());
            data.extend(if at >> 16 & 1 == 1 { 3_u32 } else { 0 }.to_be_bytes());
            at = next;
        }
        self.chunk(cookie, 1, 5, &data, &[])
    }
}
