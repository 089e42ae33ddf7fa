//! Errors by fault: the peer's ([`ProtocolError`]) or the caller's ([`ApiMisuse`]).

use thiserror::Error;

/// The first message a client expects.
pub(crate) const GREETING: &str = "a greeting (NBDMAGIC)";

/// The first bytes that servers of other protocols send.
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

/// The peer violated the protocol, or sent a message that this crate refuses to process.
///
/// The byte stream is unreliable after this error: close the connection.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A magic number is wrong.
    #[error("{}", bad_magic(expected, *found))]
    BadMagic {
        /// The expected message.
        expected: &'static str,
        /// The value received.
        found: u64,
    },
    /// The peer set handshake or client flags that were not negotiated.
    #[error("peer set unknown {which} flags {bits:#x}")]
    UnknownFlags {
        /// The name of the flag word.
        which: &'static str,
        /// The unknown bits.
        bits: u32,
    },
    /// There is more of something than [`crate::limits`] allows.
    #[error("peer sent {count} {what}, the limit is {limit}")]
    TooMany {
        /// The things that are counted.
        what: &'static str,
        /// Their number so far.
        count: u64,
        /// The largest accepted number.
        limit: u64,
    },
    /// A length exceeds [`crate::limits`] or the layout of its message.
    #[error("peer announced {length} bytes of {what}, the limit is {limit}")]
    TooLong {
        /// The field or message that the length describes.
        what: &'static str,
        /// The announced length, in bytes.
        length: u64,
        /// The largest accepted value.
        limit: u64,
    },
    /// The layout of a message contradicts its announced length or its field rules.
    #[error("peer sent a malformed {what}: {why}")]
    Malformed {
        /// The message.
        what: &'static str,
        /// The rule that the message violates.
        why: &'static str,
    },
    /// A well-formed message arrived at a moment where it is not legal.
    #[error("peer sent {what} at the wrong moment: {why}")]
    Unexpected {
        /// The message.
        what: &'static str,
        /// The reason why it is not legal.
        why: &'static str,
    },
    /// A reply names a request that is not in flight.
    #[error("peer replied to cookie {cookie:#x}, which is not in flight")]
    UnknownCookie {
        /// The cookie in the reply.
        cookie: u64,
    },
    /// A chunk does not match its request.
    #[error(
        "peer answered a request for {request_length} bytes at {request_offset} with {what} of {length} bytes at {offset}: {why}"
    )]
    BadChunk {
        /// The kind of chunk.
        what: &'static str,
        /// The mismatch.
        why: &'static str,
        /// Offset of the request, in bytes.
        request_offset: u64,
        /// Length of the request, in bytes.
        request_length: u64,
        /// Offset of the chunk, in bytes.
        offset: u64,
        /// Length of the chunk, in bytes.
        length: u64,
    },
    /// The announced export size is 2^63 bytes or more.
    #[error("peer announced an export of {size} bytes, the largest possible is 2^63-1")]
    ExportTooLarge {
        /// The announced size, in bytes.
        size: u64,
    },
    /// The peer does not support a feature that the caller requires.
    #[error("peer does not support {what}")]
    Unsupported {
        /// The missing feature.
        what: &'static str,
    },
}

/// The caller used a feature that was not negotiated, or a value that the protocol cannot express.
///
/// Nothing was sent; the connection remains usable.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ApiMisuse {
    /// The export does not offer this command or flag.
    #[error("the server does not offer {what} for this export")]
    NotNegotiated {
        /// The command or flag.
        what: &'static str,
    },
    /// The request exceeds the export.
    #[error("{length} bytes at {offset} are outside the export of {size} bytes")]
    OutOfBounds {
        /// Offset of the request, in bytes.
        offset: u64,
        /// Length of the request, in bytes.
        length: u64,
        /// Size of the export, in bytes.
        size: u64,
    },
    /// The end of the range is before its start.
    #[error("the range {start}..{end} ends before it begins")]
    ReversedRange {
        /// Start of the range, in bytes.
        start: u64,
        /// End of the range, in bytes.
        end: u64,
    },
    /// Offset or length of the request is not a multiple of the export's minimum block size.
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
        /// The largest length allowed, in bytes.
        limit: u64,
    },
    /// The length of the request is zero, for which the protocol defines no result.
    #[error("a request of zero bytes has no defined result")]
    Empty,
    /// A name or string that the protocol cannot express.
    #[error("{what} cannot be sent: {why}")]
    BadString {
        /// The kind of string.
        what: &'static str,
        /// The rule that the string violates.
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
