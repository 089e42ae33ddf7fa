//! The lines that clients of the control socket send. All input is untrusted.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::control::MAX_LINE_LEN;

/// A line of a client.
pub(super) enum Line {
    /// A line that is not empty, without its end.
    Request(Vec<u8>),
    /// The start of the next line is unknown.
    TooLong,
    /// The client has closed the connection.
    End,
}

/// The lines of a stream, of bounded length.
#[derive(Default)]
pub(super) struct Lines {
    received: Vec<u8>,
}

impl Lines {
    /// Returns the next line that is not empty. Bytes after the last line feed are not a line.
    pub(super) async fn next(&mut self, stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Line> {
        let mut looked_at = 0;
        loop {
            let end = self.received[looked_at..].iter().position(|&byte| byte == b'\n');
            if let Some(end) = end.map(|end| end + looked_at) {
                let mut line: Vec<u8> = self.received.drain(..=end).collect();
                line.pop();
                looked_at = 0;
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Ok(if line.len() > MAX_LINE_LEN {
                    Line::TooLong
                } else {
                    Line::Request(line)
                });
            }
            if self.received.len() > MAX_LINE_LEN {
                return Ok(Line::TooLong);
            }
            looked_at = self.received.len();
            let mut received = [0; 4096];
            let count = stream.read(&mut received).await?;
            if count == 0 {
                return Ok(Line::End);
            }
            self.received.extend_from_slice(&received[..count]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines(input: &[u8]) -> Vec<Vec<u8>> {
        let mut input = input;
        let mut found = Vec::new();
        let mut lines = Lines::default();
        loop {
            match lines.next(&mut input).await.unwrap() {
                Line::Request(line) => found.push(line),
                Line::TooLong => found.push(b"too long".to_vec()),
                Line::End => return found,
            }
            if found.last().is_some_and(|line| line == b"too long") {
                return found;
            }
        }
    }

    #[tokio::test]
    async fn lines_end_with_their_end_and_are_bounded() {
        assert_eq!(lines(b"a\n\n  \r\nb\nc").await, [b"a", b"b"]);
        let long = vec![b'x'; MAX_LINE_LEN];
        assert_eq!(lines(&[&long[..], b"x\n"].concat()).await, [b"too long"]);
        assert_eq!(lines(&[&long[..], b"\n"].concat()).await, [long]);
        assert_eq!(lines(&vec![b'x'; 10 << 20]).await, [b"too long"]);
    }
}
