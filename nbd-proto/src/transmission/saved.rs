//! A connection between two requests, as bytes: one server passes it to its successor.
//!
//! ```text
//! | magic u64 | version u32 | reply mode u32 | size u64 | flags u32
//! | minimum u32 | preferred u32 | maximum payload u32 | owes failure u32 | to discard u64
//! | name length u32, name | contexts u32 | id u32, length u32, name | ...
//! | received length u32, received |
//! ```
//!
//! All numbers are big-endian. This is not part of the NBD protocol.

use bytes::BufMut;

use crate::codec::{Reader, protocol_string};
use crate::error::ProtocolError;
use crate::handshake::Negotiated;
use crate::limits::{
    MAX_DISCARDED_PAYLOAD, MAX_EXPORT_SIZE, MAX_META_CONTEXTS, MAX_SAVED_RECEIVED_LEN,
};
use crate::wire::{BlockSizes, MetaContextId, MetaContextName, ReplyMode, TransmissionFlags};

/// "NBDSAVED".
const MAGIC: u64 = 0x4e42_4453_4156_4544;
/// The version of the layout. Other versions are refused.
const VERSION: u32 = 1;

const WHAT: &str = "saved connection";

/// A connection whose requests are all answered, except for received ones that have not begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedConnection {
    /// The result of its handshake.
    pub negotiated: Negotiated,
    /// Bytes that were received and belong to requests that have not begun.
    pub received: Vec<u8>,
    /// Number of bytes, at the start of `received` and possibly after it, that are the payload of a
    /// refused request.
    pub discard: u64,
    /// Whether the client still has to be told that data it has written may be lost.
    pub owes_failure: bool,
}

impl SavedConnection {
    /// Returns the connection as bytes.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::TooLong`] if it has received more than
    /// [`MAX_SAVED_RECEIVED_LEN`](crate::limits::MAX_SAVED_RECEIVED_LEN) bytes.
    pub fn encode(&self) -> Result<Vec<u8>, ProtocolError> {
        let length = self.received.len();
        if length > MAX_SAVED_RECEIVED_LEN {
            return Err(too_long("received bytes", length as u64, MAX_SAVED_RECEIVED_LEN as u64));
        }
        let Negotiated { export_name, size, flags, block_sizes, reply_mode, meta_contexts } =
            &self.negotiated;
        let mut out = Vec::with_capacity(length.saturating_add(256));
        out.put_u64(MAGIC);
        out.put_u32(VERSION);
        out.put_u32(match reply_mode {
            ReplyMode::Simple => 0,
            ReplyMode::Structured => 1,
            ReplyMode::Extended => 2,
        });
        out.put_u64(*size);
        out.put_u32(flags.bits().into());
        out.put_u32(block_sizes.minimum());
        out.put_u32(block_sizes.preferred());
        out.put_u32(block_sizes.maximum_payload());
        out.put_u32(self.owes_failure.into());
        out.put_u64(self.discard);
        put_bytes(export_name.as_bytes(), &mut out);
        out.put_u32(meta_contexts.len() as u32);
        for (id, name) in meta_contexts {
            out.put_u32(id.0);
            put_bytes(name.as_str().as_bytes(), &mut out);
        }
        put_bytes(&self.received, &mut out);
        Ok(out)
    }

    /// Reads a connection from bytes.
    ///
    /// # Errors
    ///
    /// [`ProtocolError`] if the bytes have another version, contradict themselves or exceed a
    /// limit.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(bytes);
        let found = reader.u64().ok_or(malformed("it is too short"))?;
        if found != MAGIC {
            return Err(ProtocolError::BadMagic { expected: WHAT, found });
        }
        if number(&mut reader)? != VERSION {
            return Err(malformed("it is of another version"));
        }
        let reply_mode = match number(&mut reader)? {
            0 => ReplyMode::Simple,
            1 => ReplyMode::Structured,
            2 => ReplyMode::Extended,
            _ => return Err(malformed("its reply mode is unknown")),
        };
        let size = reader.u64().ok_or(malformed("it is too short"))?;
        if size > MAX_EXPORT_SIZE {
            return Err(ProtocolError::ExportTooLarge { size });
        }
        let flags = u16::try_from(number(&mut reader)?).ok().and_then(TransmissionFlags::from_bits);
        let flags = flags.ok_or(malformed("a transmission flag is unknown"))?;
        let (minimum, preferred) = (number(&mut reader)?, number(&mut reader)?);
        let block_sizes = BlockSizes::new(minimum, preferred, number(&mut reader)?)?;
        let owes_failure = match number(&mut reader)? {
            0 => false,
            1 => true,
            _ => return Err(malformed("a value is neither true nor false")),
        };
        let discard = reader.u64().ok_or(malformed("it is too short"))?;
        if discard > MAX_DISCARDED_PAYLOAD {
            return Err(too_long("discarded payload", discard, MAX_DISCARDED_PAYLOAD));
        }
        let export_name = protocol_string("export name", counted(&mut reader)?)?.to_owned();
        let meta_contexts = contexts(&mut reader)?;
        if reply_mode == ReplyMode::Simple && !meta_contexts.is_empty() {
            return Err(malformed("it has metadata contexts and simple replies"));
        }
        let received = counted(&mut reader)?;
        if received.len() > MAX_SAVED_RECEIVED_LEN {
            let limit = MAX_SAVED_RECEIVED_LEN as u64;
            return Err(too_long("received bytes", received.len() as u64, limit));
        }
        if !reader.is_empty() {
            return Err(malformed("there are bytes after its end"));
        }
        let negotiated =
            Negotiated { export_name, size, flags, block_sizes, reply_mode, meta_contexts };
        Ok(Self { negotiated, received: received.to_vec(), discard, owes_failure })
    }
}

fn contexts(
    reader: &mut Reader<'_>,
) -> Result<Vec<(MetaContextId, MetaContextName)>, ProtocolError> {
    let count = number(reader)?;
    if count as usize > MAX_META_CONTEXTS {
        return Err(too_long("metadata contexts", count.into(), MAX_META_CONTEXTS as u64));
    }
    let mut contexts: Vec<(MetaContextId, MetaContextName)> = Vec::new();
    for _ in 0..count {
        let id = MetaContextId(number(reader)?);
        let text = protocol_string("metadata context name", counted(reader)?)?;
        let name = MetaContextName::new(text)?;
        if contexts.iter().any(|(known, other)| *known == id || *other == name) {
            return Err(malformed("a metadata context is there twice"));
        }
        contexts.push((id, name));
    }
    Ok(contexts)
}

/// All lengths are below 2^32: they were checked.
fn put_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    out.put_u32(bytes.len() as u32);
    out.put_slice(bytes);
}

fn number(reader: &mut Reader<'_>) -> Result<u32, ProtocolError> {
    reader.u32().ok_or(malformed("it is too short"))
}

fn counted<'a>(reader: &mut Reader<'a>) -> Result<&'a [u8], ProtocolError> {
    let length = number(reader)? as usize;
    reader.bytes(length).ok_or(malformed("it is too short"))
}

const fn malformed(why: &'static str) -> ProtocolError {
    ProtocolError::Malformed { what: WHAT, why }
}

const fn too_long(what: &'static str, length: u64, limit: u64) -> ProtocolError {
    ProtocolError::TooLong { what, length, limit }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> SavedConnection {
        let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH;
        let mut negotiated = Negotiated::new("disk", 1 << 30, flags, ReplyMode::Extended);
        negotiated.block_sizes = BlockSizes::new(512, 4096, 1 << 20).unwrap();
        negotiated.meta_contexts = vec![
            (MetaContextId(0), MetaContextName::base_allocation()),
            (MetaContextId(7), MetaContextName::qemu_dirty_bitmap("monday").unwrap()),
        ];
        SavedConnection {
            negotiated,
            received: b"half a request".to_vec(),
            discard: 4096,
            owes_failure: true,
        }
    }

    #[test]
    fn a_connection_comes_back_as_it_was_saved() {
        let mut saved = example();
        assert_eq!(SavedConnection::decode(&saved.encode().unwrap()).as_ref(), Ok(&saved));
        saved.negotiated.meta_contexts.clear();
        saved.negotiated.reply_mode = ReplyMode::Simple;
        (saved.received, saved.discard, saved.owes_failure) = (Vec::new(), 0, false);
        assert_eq!(SavedConnection::decode(&saved.encode().unwrap()), Ok(saved));
    }

    #[test]
    fn the_layout_of_version_one_stays() {
        let mut saved = example();
        saved.negotiated.meta_contexts.truncate(1);
        let expected = [
            &b"NBDSAVED"[..],
            &[0, 0, 0, 1, 0, 0, 0, 2],
            &[0, 0, 0, 0, 0x40, 0, 0, 0],
            &[0, 0, 0, 5, 0, 0, 2, 0, 0, 0, 0x10, 0, 0, 0x10, 0, 0],
            &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x10, 0],
            b"\0\0\0\x04disk",
            b"\0\0\0\x01\0\0\0\0\0\0\0\x0fbase:allocation",
            b"\0\0\0\x0ehalf a request",
        ];
        assert_eq!(saved.encode().unwrap(), expected.concat());
    }

    #[test]
    fn damaged_bytes_are_refused_and_never_panic() {
        let good = example().encode().unwrap();
        for end in 0..good.len() {
            assert!(SavedConnection::decode(&good[..end]).is_err(), "cut at {end}");
        }
        assert!(SavedConnection::decode(&[&good[..], &[0]].concat()).is_err());
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                // What is read is saved again as the same bytes.
                if let Ok(saved) = SavedConnection::decode(&bad) {
                    assert_eq!(saved.encode().unwrap(), bad, "byte {at}, bit {bit}");
                }
            }
        }
    }

    #[test]
    fn contradictions_are_refused() {
        let refused = |change: &dyn Fn(&mut SavedConnection)| {
            let mut saved = example();
            change(&mut saved);
            assert!(SavedConnection::decode(&saved.encode().unwrap()).is_err(), "{saved:?}");
        };
        refused(&|saved| saved.negotiated.reply_mode = ReplyMode::Simple);
        refused(&|saved| saved.negotiated.size = 1 << 63);
        refused(&|saved| saved.negotiated.export_name = "a\0".into());
        refused(&|saved| saved.negotiated.meta_contexts[1].0 = MetaContextId(0));
        refused(&|saved| saved.discard = MAX_DISCARDED_PAYLOAD + 1);
        let mut long = example();
        long.received = vec![0; MAX_SAVED_RECEIVED_LEN + 1];
        assert!(long.encode().is_err());
    }
}
