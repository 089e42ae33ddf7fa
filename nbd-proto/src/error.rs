//! Errors by fault: the peer's ([`ProtocolError`]) or the caller's ([`ApiMisuse`]).

use thiserror::Error;

/// What a client waits for first.
pub(crate) const GREETING: &str = "a greeting (NBDMAGIC)";

/// What servers of other protocols begin with.
const OTHER_PROTOCOLS: [(&[u8], &str); 7] = [
    (b"HTTP/", "HTTP"),
    (b"SSH-", "SSH"),
    (b"220 ", "SMTP or FTP"),
    (b"220-", "SMTP or FTP"),
    (b"RFB ", "VNC"),
    (b"* OK", "IMAP"),
    (b"+OK", "POP3"),
];

fn bad_magic(expected: &str, found: u64) -> String {
    let bytes = found.to_be_bytes();
    let other = OTHER_PROTOCOLS.iter().find(|(start, _)| bytes.starts_with(start));
    match (other, std::str::from_utf8(&bytes)) {
        (Some((_, protocol)), _) if expected == GREETING => {
            format!("this is not an NBD server: it speaks {protocol}; check the host and the port")
        }
        (_, Ok(text))
            if expected == GREETING && text.bytes().all(|byte| matches!(byte, b' '..=b'~')) =>
        {
            format!("this is not an NBD server: it begins with '{text}' instead of {expected}")
        }
        _ => format!(
            "peer sent {found:#x} in place of {expected}: it does not speak NBD, or the stream is \
             out of sync"
        ),
    }
}

/// The peer sent something that the protocol forbids, or something we refuse to process.
///
/// After such an error the byte stream cannot be trusted any more: close the connection.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A magic number is not the one that has to stand here.
    #[error("{}", bad_magic(expected, *found))]
    BadMagic {
        /// The name of the message expected.
        expected: &'static str,
        /// What came instead.
        found: u64,
    },
    /// Handshake or client flags that were not negotiated.
    #[error("peer set unknown {which} flags {bits:#x}")]
    UnknownFlags {
        /// Which flag word.
        which: &'static str,
        /// The bits that are not known.
        bits: u32,
    },
    /// A length beyond what [`crate::limits`] or the message's own layout allows.
    #[error("peer announced {length} bytes of {what}, the limit is {limit}")]
    TooLong {
        /// What the length belongs to.
        what: &'static str,
        /// The length announced, in bytes or elements.
        length: u64,
        /// The largest acceptable value.
        limit: u64,
    },
    /// A message whose layout does not fit its announced length or its field rules.
    #[error("peer sent a malformed {what}: {why}")]
    Malformed {
        /// The message.
        what: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A well-formed message at a moment where it is not legal.
    #[error("peer sent {what} at the wrong moment: {why}")]
    Unexpected {
        /// The message.
        what: &'static str,
        /// Why it is not legal now.
        why: &'static str,
    },
    /// A reply to a request that is not in flight.
    #[error("peer replied to cookie {cookie:#x}, which is not in flight")]
    UnknownCookie {
        /// The cookie of the reply.
        cookie: u64,
    },
    /// A chunk that does not fit the request it answers.
    #[error(
        "peer answered a request for {request_length} bytes at {request_offset} with {what} of {length} bytes at {offset}: {why}"
    )]
    BadChunk {
        /// The kind of chunk.
        what: &'static str,
        /// What is wrong with it.
        why: &'static str,
        /// Offset of the request, in bytes.
        request_offset: u64,
        /// Length of the request, in bytes.
        request_length: u64,
        /// Offset the chunk speaks of, in bytes.
        offset: u64,
        /// Length the chunk speaks of, in bytes.
        length: u64,
    },
    /// An export size of 2^63 bytes or more.
    #[error("peer announced an export of {size} bytes, the largest possible is 2^63-1")]
    ExportTooLarge {
        /// The size announced, in bytes.
        size: u64,
    },
    /// The peer does not offer what the caller requires.
    #[error("peer does not support {what}")]
    Unsupported {
        /// What is missing.
        what: &'static str,
    },
}

/// The caller asked for something that was not negotiated or cannot be expressed.
///
/// Nothing was sent; the connection is unharmed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ApiMisuse {
    /// The export does not offer this command or flag.
    #[error("the server does not offer {what} for this export")]
    NotNegotiated {
        /// The command or flag.
        what: &'static str,
    },
    /// The request leaves the export.
    #[error("{length} bytes at {offset} are outside the export of {size} bytes")]
    OutOfBounds {
        /// Offset of the request, in bytes.
        offset: u64,
        /// Length of the request, in bytes.
        length: u64,
        /// Size of the export, in bytes.
        size: u64,
    },
    /// The range ends before it begins.
    #[error("the range {start}..{end} ends before it begins")]
    ReversedRange {
        /// Start of the range, in bytes.
        start: u64,
        /// End of the range, in bytes.
        end: u64,
    },
    /// The request is not a multiple of the export's minimum block size.
    #[error("{length} bytes at {offset} are not aligned to the minimum block size {minimum}")]
    Unaligned {
        /// Offset of the request, in bytes.
        offset: u64,
        /// Length of the request, in bytes.
        length: u64,
        /// The minimum block size, in bytes.
        minimum: u32,
    },
    /// The request is longer than the protocol mode or the export allows.
    #[error("a request of {length} bytes is over the limit of {limit}; split it")]
    TooLong {
        /// Length of the request, in bytes.
        length: u64,
        /// The largest length possible, in bytes.
        limit: u64,
    },
    /// The request has a length of zero, which the protocol leaves undefined.
    #[error("a request of zero bytes has no defined result")]
    Empty,
    /// A name or string that the protocol cannot carry.
    #[error("{what} cannot be sent: {why}")]
    BadString {
        /// Which string.
        what: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_of_other_protocols_are_named() {
        for (found, words) in [
            (b"HTTP/1.1", "it speaks HTTP;"),
            (b"SSH-2.0-", "it speaks SSH;"),
            (b"220 mail", "it speaks SMTP or FTP;"),
            (b"whatever", "it begins with 'whatever'"),
            (b"\0\x01345678", "0x"),
        ] {
            let found = u64::from_be_bytes(*found);
            let error = ProtocolError::BadMagic { expected: GREETING, found }.to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
