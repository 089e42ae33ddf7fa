//! Prints one direction of a captured session, message by message.
//!
//! ```text
//! decode client|server FILE
//! ```
//!
//! FILE contains the bytes that one side sent, raw or as hexadecimal digits; `-` is standard input.
//! The magic numbers show the form of requests and replies.
//!
//! ```text
//! printf '4e42444d41474943 49484156454f5054 0003' | cargo run --example decode -- server -
//! ```

use std::error::Error;
use std::fmt::Write as _;
use std::io::Read as _;

use nbd_proto::wire::{
    ChunkHeader, CommandFlags, CommandType, HandshakeFlags, InfoType, OptionHeader,
    OptionReplyHeader, OptionReplyType, OptionType, ReplyType, RequestHeader, SimpleReplyHeader,
    TransmissionFlags, magic,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let (Some(file), false) = (arguments.pop(), arguments.is_empty()) else {
        return Err("usage: decode client|server FILE (see the head of the source)".into());
    };
    let mut bytes = Vec::new();
    if file == "-" {
        std::io::stdin().read_to_end(&mut bytes)?;
    } else {
        bytes = std::fs::read(&file).map_err(|error| format!("{file}: {error}"))?;
    }
    decode(&arguments[0], &bytes)
}

/// Prints the messages of `side`, "client" or "server"; `bytes` are raw or hexadecimal digits.
pub(crate) fn decode(side: &str, bytes: &[u8]) -> Result<(), Box<dyn Error>> {
    let digits = from_hex(bytes);
    let mut decoder = Decoder { rest: digits.as_deref().unwrap_or(bytes), at: 0 };
    match side {
        "client" => decoder.client(),
        "server" => decoder.server(),
        other => Err(format!("{other:?} is neither client nor server").into()),
    }
}

/// Digits and blanks only: the text form of the bytes.
fn from_hex(text: &[u8]) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text.iter().copied().filter(|b| !b.is_ascii_whitespace()).collect();
    if digits.is_empty()
        || !digits.len().is_multiple_of(2)
        || !digits.iter().all(u8::is_ascii_hexdigit)
    {
        return None;
    }
    let value = |digit: u8| char::from(digit).to_digit(16).unwrap_or(0) as u8;
    Some(digits.chunks_exact(2).map(|pair| value(pair[0]) * 16 + value(pair[1])).collect())
}

struct Decoder<'a> {
    rest: &'a [u8],
    at: usize,
}

type Outcome = Result<(), Box<dyn Error>>;

impl<'a> Decoder<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Box<dyn Error>> {
        let Some((head, rest)) = self.rest.split_at_checked(length) else {
            let have = self.rest.len();
            return Err(format!(
                "the capture ends inside a message: {length} bytes are due, {have} there"
            )
            .into());
        };
        self.rest = rest;
        self.at += length;
        Ok(head)
    }

    /// Prints a line with the offset of the message.
    #[allow(clippy::print_stdout)] // It is what the example is for.
    fn say(&self, at: usize, text: &str) {
        println!("{at:8}  {text}");
        debug_assert!(at <= self.at);
    }

    fn magic(&self) -> Option<u32> {
        self.rest.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
    }

    /// Client flags, options, requests.
    fn client(&mut self) -> Outcome {
        let flags = self.take(4)?;
        self.say(0, &format!("client flags {flags:02x?}"));
        while !self.rest.is_empty() {
            let at = self.at;
            match self.magic() {
                Some(magic::REQUEST) => {
                    let header = RequestHeader::decode_compact(self.rest)?;
                    self.request(at, header, RequestHeader::COMPACT_LEN)?;
                }
                Some(magic::EXTENDED_REQUEST) => {
                    let header = RequestHeader::decode_extended(self.rest)?;
                    self.request(at, header, RequestHeader::EXTENDED_LEN)?;
                }
                _ => {
                    let header = OptionHeader::decode(self.rest)?.ok_or("half an option")?;
                    self.take(OptionHeader::LEN)?;
                    let payload = self.take(header.length as usize)?;
                    let option = header.option;
                    self.say(at, &format!("option {option}{}", option_text(option, payload)));
                }
            }
        }
        Ok(())
    }

    fn request(&mut self, at: usize, header: Option<RequestHeader>, length: usize) -> Outcome {
        let header = header.ok_or("half a request")?;
        self.take(length)?;
        let flags = header.flags;
        let has_payload = header.command == CommandType::WRITE
            || (length == RequestHeader::EXTENDED_LEN && flags.contains(CommandFlags::PAYLOAD_LEN));
        let cookie = header.cookie.0;
        let mut text = format!(
            "{} cookie {cookie:#x} offset {} length {} {flags:?}",
            header.command, header.offset, header.length
        );
        if has_payload {
            let payload = self.take(usize::try_from(header.length)?)?;
            let _ = write!(text, " payload {}", preview(payload));
        }
        self.say(at, &text);
        Ok(())
    }

    /// The greeting, option replies, replies. The data behind a simple reply to a READ is not
    /// marked as such on the wire: it is skipped up to the next magic number.
    fn server(&mut self) -> Outcome {
        let greeting = self.take(18)?;
        let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
        let flags = HandshakeFlags::from_bits_retain(flags);
        self.say(0, &format!("greeting {flags:?}"));
        while !self.rest.is_empty() {
            let at = self.at;
            match self.magic() {
                Some(magic::SIMPLE_REPLY) => {
                    let header = SimpleReplyHeader::decode(self.rest).ok_or("half a reply")?;
                    self.take(SimpleReplyHeader::LEN)?;
                    let cookie = header.cookie.0;
                    self.say(
                        at,
                        &format!("simple reply cookie {cookie:#x} error {}", header.error),
                    );
                }
                Some(magic::STRUCTURED_REPLY) => {
                    let header =
                        ChunkHeader::decode_structured(self.rest)?.ok_or("half a chunk")?;
                    self.take(ChunkHeader::STRUCTURED_LEN)?;
                    self.chunk(at, header)?;
                }
                Some(magic::EXTENDED_REPLY) => {
                    let (header, _) =
                        ChunkHeader::decode_extended(self.rest)?.ok_or("half a chunk")?;
                    self.take(ChunkHeader::EXTENDED_LEN)?;
                    self.chunk(at, header)?;
                }
                _ if self.rest.starts_with(&magic::OPTION_REPLY.to_be_bytes()) => {
                    let header = OptionReplyHeader::decode(self.rest)?.ok_or("half a reply")?;
                    self.take(OptionReplyHeader::LEN)?;
                    let payload = self.take(header.length as usize)?;
                    let (option, reply) = (header.option, header.reply);
                    self.say(
                        at,
                        &format!("reply to {option}: {reply}{}", reply_text(reply, payload)),
                    );
                }
                _ => self.skip_data()?,
            }
        }
        Ok(())
    }

    fn chunk(&mut self, at: usize, header: ChunkHeader) -> Outcome {
        let payload = self.take(usize::try_from(header.length)?)?;
        let mut text = format!("{} cookie {:#x} {:?}", header.reply, header.cookie.0, header.flags);
        let offset = || payload.first_chunk().map(|bytes| u64::from_be_bytes(*bytes));
        match header.reply {
            ReplyType::OFFSET_DATA | ReplyType::OFFSET_HOLE => {
                let content = payload.get(8..).unwrap_or_default();
                let _ = write!(text, " offset {:?} {}", offset(), preview(content));
            }
            _ if !payload.is_empty() => {
                let _ = write!(text, " {}", preview(payload));
            }
            _ => {}
        }
        self.say(at, &text);
        Ok(())
    }

    fn skip_data(&mut self) -> Outcome {
        let at = self.at;
        let next = (1..self.rest.len())
            .find(|start| {
                let word = self.rest.get(*start..).and_then(|rest| rest.first_chunk::<4>());
                word.is_some_and(|word| u32::from_be_bytes(*word) == magic::SIMPLE_REPLY)
            })
            .unwrap_or(self.rest.len());
        let data = self.take(next)?;
        self.say(at, &format!("  data {}", preview(data)));
        Ok(())
    }
}

/// The name in the payload of an option, where there is one.
fn option_text(option: OptionType, payload: &[u8]) -> String {
    let name = match option {
        OptionType::EXPORT_NAME => Some(payload),
        OptionType::INFO
        | OptionType::GO
        | OptionType::LIST_META_CONTEXT
        | OptionType::SET_META_CONTEXT => payload
            .first_chunk()
            .and_then(|bytes| payload.get(4..)?.get(..u32::from_be_bytes(*bytes) as usize)),
        _ => None,
    };
    match name {
        Some(name) => {
            format!(" name {:?} ({} bytes)", String::from_utf8_lossy(name), payload.len())
        }
        None if payload.is_empty() => String::new(),
        None => format!(" {}", preview(payload)),
    }
}

fn reply_text(reply: OptionReplyType, payload: &[u8]) -> String {
    match (reply, payload.split_first_chunk::<2>()) {
        (OptionReplyType::INFO, Some((kind, content))) => {
            let info = InfoType(u16::from_be_bytes(*kind));
            match (info, content.split_first_chunk::<8>()) {
                (InfoType::EXPORT, Some((size, flags))) if flags.len() == 2 => {
                    let flags = u16::from_be_bytes([flags[0], flags[1]]);
                    let flags = TransmissionFlags::from_bits_retain(flags);
                    format!(" EXPORT size {} {flags:?}", u64::from_be_bytes(*size))
                }
                _ => format!(" {info} {}", preview(content)),
            }
        }
        _ if reply.is_error() => format!(" {:?}", String::from_utf8_lossy(payload)),
        _ if payload.is_empty() => String::new(),
        _ => format!(" {}", preview(payload)),
    }
}

/// The first bytes, as digits and as text.
fn preview(bytes: &[u8]) -> String {
    let mut text = format!("{} bytes:", bytes.len());
    for byte in bytes.iter().take(16) {
        let _ = write!(text, " {byte:02x}");
    }
    if bytes.len() > 16 {
        text.push_str(" ...");
    }
    let shown: String = bytes
        .iter()
        .take(16)
        .map(|byte| if byte.is_ascii_graphic() { char::from(*byte) } else { '.' })
        .collect();
    let _ = write!(text, "  |{shown}|");
    text
}
