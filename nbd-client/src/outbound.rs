//! Requests to be sent, combined so that one system call sends many.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::AsyncWrite;

/// Payloads up to this many bytes are copied after their header: cheaper than a segment.
const COPIED_LEN: usize = 4096;

/// Most segments in one system call; the kernel accepts at most 1024.
const PARTS: usize = 64;

/// Bytes to write: complete segments, and headers that are still being collected.
#[derive(Debug, Default)]
pub(crate) struct Outbound {
    segments: VecDeque<Bytes>,
    gathering: BytesMut,
}

impl Outbound {
    /// The buffer to which request headers are appended.
    pub(crate) const fn headers(&mut self) -> &mut BytesMut {
        &mut self.gathering
    }

    /// Appends the data of a WRITE; large data is not copied.
    pub(crate) fn payload(&mut self, payload: &Bytes) {
        if payload.len() <= COPIED_LEN {
            self.gathering.extend_from_slice(payload);
        } else {
            self.seal();
            self.segments.push_back(payload.clone());
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.segments.is_empty() && self.gathering.is_empty()
    }

    fn seal(&mut self) {
        if !self.gathering.is_empty() {
            self.segments.push_back(self.gathering.split().freeze());
        }
    }

    /// Writes once and returns the number of bytes written.
    pub(crate) fn poll_write<W: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut W,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        self.seal();
        let mut parts = [IoSlice::new(&[]); PARTS];
        let mut count = 0;
        for (part, segment) in parts.iter_mut().zip(&self.segments) {
            *part = IoSlice::new(segment);
            count += 1;
        }
        let parts = parts.get(..count).unwrap_or(&parts);
        let written = ready!(Pin::new(stream).poll_write_vectored(cx, parts))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.consume(written);
        Poll::Ready(Ok(written))
    }

    fn consume(&mut self, mut written: usize) {
        while let Some(segment) = self.segments.front_mut() {
            if written < segment.len() {
                segment.advance(written);
                return;
            }
            written -= segment.len();
            self.segments.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    #[test]
    fn everything_goes_out_in_order_however_little_the_socket_takes() {
        let mut out = Outbound::default();
        let large = Bytes::from(vec![7; COPIED_LEN + 1]);
        let mut expected = Vec::new();
        for round in 0..3_u8 {
            out.headers().extend_from_slice(&[round; 5]);
            out.payload(&Bytes::from_static(b"small"));
            out.headers().extend_from_slice(&[round; 3]);
            out.payload(&large);
            expected.extend_from_slice(&[round; 5]);
            expected.extend_from_slice(b"small");
            expected.extend_from_slice(&[round; 3]);
            expected.extend_from_slice(&large);
        }
        let mut written = Vec::new();
        let mut cx = Context::from_waker(Waker::noop());
        for step in 1.. {
            if out.is_empty() {
                break;
            }
            let mut socket = Narrow { room: step % 999 + 1, written: &mut written };
            assert!(matches!(out.poll_write(&mut socket, &mut cx), Poll::Ready(Ok(n)) if n > 0));
        }
        assert_eq!(written, expected);
    }

    /// Takes at most `room` bytes.
    struct Narrow<'a> {
        room: usize,
        written: &'a mut Vec<u8>,
    }

    impl AsyncWrite for Narrow<'_> {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let taken = bytes.get(..self.room).unwrap_or(bytes);
            self.written.extend_from_slice(taken);
            Poll::Ready(Ok(taken.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }
}
