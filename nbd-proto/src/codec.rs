//! Reads big-endian fields from slices; no input causes a panic.

use crate::error::ProtocolError;
use crate::limits::MAX_STRING_LEN;

/// Reads fields from the front of a slice. Every method returns `None` if too few bytes are left.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Creates a reader at the start of `bytes`.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Returns the bytes that have not been read yet.
    #[must_use]
    pub const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Returns true if no bytes are left.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Reads the next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(len)?;
        self.rest = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        Some(*head)
    }

    /// Reads a 16-bit number.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// Reads a 32-bit number.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// Reads a 64-bit number.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
}

/// Checks a protocol string: UTF-8, no NUL byte, at most [`MAX_STRING_LEN`] bytes (section
/// "Conventions").
///
/// # Errors
///
/// [`ProtocolError::TooLong`] or [`ProtocolError::Malformed`], naming `what`.
pub fn protocol_string<'a>(what: &'static str, bytes: &'a [u8]) -> Result<&'a str, ProtocolError> {
    if bytes.len() > MAX_STRING_LEN {
        return Err(ProtocolError::TooLong {
            what,
            length: bytes.len() as u64,
            limit: MAX_STRING_LEN as u64,
        });
    }
    let text = std::str::from_utf8(bytes)
        .map_err(|_| ProtocolError::Malformed { what, why: "it is not UTF-8" })?;
    if text.contains('\0') {
        return Err(ProtocolError::Malformed { what, why: "it contains a NUL byte" });
    }
    Ok(text)
}

/// Truncates `text` to at most `limit` bytes at a character boundary.
#[must_use]
pub(crate) fn truncate_text(text: &str, limit: usize) -> &str {
    if text.len() <= limit {
        return text;
    }
    let mut end = limit;
    while !text.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    text.get(..end).unwrap_or("")
}

/// Returns whether a character shows itself, and nothing else: it does not control a terminal or
/// the direction of text, and is not invisible. Names are those of others and may lie.
#[must_use]
pub fn is_plain(character: char) -> bool {
    match character {
        ' '..='~' => true,
        // Ignored where text is shown, although they are letters and marks.
        '\u{34f}'
        | '\u{115f}'..='\u{1160}'
        | '\u{17b4}'..='\u{17b5}'
        | '\u{180b}'..='\u{180f}'
        | '\u{2800}'
        | '\u{3164}'
        | '\u{fe00}'..='\u{fe0f}'
        | '\u{ffa0}'
        | '\u{e0100}'..='\u{e01ef}' => false,
        _ => {
            // The standard library escapes everything that cannot be seen, and marks only at the
            // start of a text.
            let mut text = String::from("a");
            text.push(character);
            text.escape_debug().count() == 2
        }
    }
}

/// Text sent by the peer, safe to print on a terminal: what is not plain is escaped.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PeerText<'a>(pub(crate) &'a str);

impl std::fmt::Display for PeerText<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.chars().try_for_each(|character| match is_plain(character) {
            true => write!(f, "{character}"),
            false => write!(f, "{}", character.escape_default()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_controls_text_or_is_invisible_is_not_plain() {
        let directions = ('\u{202a}'..='\u{202e}').chain('\u{2066}'..='\u{2069}');
        let marks =
            ['\u{200b}', '\u{200d}', '\u{200e}', '\u{200f}', '\u{61c}', '\u{ad}', '\u{feff}'];
        let others = ['\u{1b}', '\u{9b}', '\n', '\u{7f}', '\u{2028}', '\u{3164}', '\u{e0041}'];
        for character in directions.chain(marks).chain(others) {
            assert!(!is_plain(character), "{character:?}");
        }
        // Names that were written on a Mac have marks.
        for character in " '\"\\~aéße\u{301}日本語עבריתعربيपा🖴".chars() {
            assert!(is_plain(character), "{character:?}");
        }
        assert_eq!(PeerText("a\u{202e}b\n").to_string(), "a\\u{202e}b\\n");
    }

    #[test]
    fn fields_come_out_big_endian_and_then_nothing() {
        let mut reader = Reader::new(&[1, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 4, 9]);
        assert_eq!(reader.u16(), Some(0x0102));
        assert_eq!(reader.u32(), Some(3));
        assert_eq!(reader.u64(), Some(4));
        assert_eq!(reader.u16(), None, "one byte is left, a u16 needs two");
        assert_eq!(reader.bytes(1), Some(&[9][..]));
        assert!(reader.is_empty());
    }

    #[test]
    fn strings_longer_than_the_limit_or_with_nul_are_refused() {
        assert!(protocol_string("name", &[b'a'; 4096]).is_ok());
        assert!(matches!(
            protocol_string("name", &[b'a'; 4097]),
            Err(ProtocolError::TooLong { length: 4097, .. })
        ));
        assert!(protocol_string("name", b"a\0b").is_err());
        assert!(protocol_string("name", &[0xff, 0xfe]).is_err());
    }

    #[test]
    fn text_is_cut_between_characters() {
        assert_eq!(truncate_text("grün", 3), "gr");
        assert_eq!(truncate_text("grün", 4), "grü");
        assert_eq!(truncate_text("abc", 10), "abc");
    }
}
