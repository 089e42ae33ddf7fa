//! Bodies in chunks (RFC 9112, section 7.1).

use std::task::{Context, Poll, ready};

use object_store::client::HttpError;

use super::connection::{Connection, broken};
use super::head::not_http;

/// Most bytes of extensions and trailers in a body. Nothing looks at them.
const UNUSED_MAX: usize = 16 << 10;

/// What comes next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Next {
    #[default]
    Size,
    Data(u64),
    EndOfData,
    Trailer,
    Nothing,
}

/// A body in chunks.
#[derive(Debug, Default)]
pub(super) struct Chunks {
    next: Next,
    unused: usize,
}

impl Chunks {
    /// Reads some bytes of the body; none at its end.
    pub(super) fn poll_read(
        &mut self,
        context: &mut Context<'_>,
        connection: &mut Connection,
        buffer: &mut [u8],
    ) -> Poll<Result<usize, HttpError>> {
        loop {
            match self.next {
                Next::Nothing => return Poll::Ready(Ok(0)),
                Next::Data(left) => {
                    let most =
                        usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
                    let read = ready!(connection.poll_read(context, &mut buffer[..most]));
                    let read = read.ok().filter(|read| *read > 0).ok_or_else(broken)?;
                    self.next = match left.saturating_sub(read as u64) {
                        0 => Next::EndOfData,
                        left => Next::Data(left),
                    };
                    return Poll::Ready(Ok(read));
                }
                Next::Size | Next::EndOfData | Next::Trailer => {
                    let line = ready!(connection.poll_line(context))?;
                    self.next = self.after(&line).ok_or_else(not_http)?;
                }
            }
        }
    }

    /// What comes after a line.
    fn after(&mut self, line: &[u8]) -> Option<Next> {
        match self.next {
            Next::Size => {
                let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
                let (size, extension) = line.split_at(digits);
                let is_extension =
                    extension.trim_ascii_start().first().is_none_or(|it| *it == b';');
                self.unused += extension.len();
                let size = std::str::from_utf8(size).ok().filter(|_| is_extension)?;
                match u64::from_str_radix(size, 16).ok()? {
                    _ if self.unused > UNUSED_MAX => None,
                    0 => Some(Next::Trailer),
                    size => Some(Next::Data(size)),
                }
            }
            Next::EndOfData => line.is_empty().then_some(Next::Size),
            _ => {
                self.unused += line.len();
                match line.is_empty() {
                    true => Some(Next::Nothing),
                    false => (self.unused <= UNUSED_MAX).then_some(Next::Trailer),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(lines: &[&str]) -> Option<Next> {
        let mut chunks = Chunks::default();
        for line in lines {
            chunks.next = chunks.after(line.as_bytes())?;
        }
        Some(chunks.next)
    }

    #[test]
    fn size_of_a_chunk_is_hexadecimal_and_may_have_extensions() {
        assert_eq!(sizes(&["1aF"]), Some(Next::Data(0x1af)));
        assert_eq!(sizes(&["5;a=b"]), Some(Next::Data(5)));
        assert_eq!(sizes(&["5 ;a"]), Some(Next::Data(5)));
        assert_eq!(sizes(&["0"]), Some(Next::Trailer));
        assert_eq!(sizes(&["0", "a: b", ""]), Some(Next::Nothing));
        for bad in ["", ";a", "x", "+5", "-5", "5x", "0x5", " 5", "10000000000000000"] {
            assert_eq!(sizes(&[bad]), None, "{bad}");
        }
    }

    #[test]
    fn bytes_beside_the_data_are_limited() {
        let long = format!("5;{}", "x".repeat(UNUSED_MAX));
        assert_eq!(sizes(&[&long]), None);
        let mut trailers = vec!["0"];
        trailers.extend(["name: value"; UNUSED_MAX / 10]);
        assert_eq!(sizes(&trailers), None);
        let mut chunks = Chunks { next: Next::EndOfData, unused: 0 };
        assert_eq!(chunks.after(b"x"), None);
        assert_eq!(chunks.after(b""), Some(Next::Size));
    }
}
