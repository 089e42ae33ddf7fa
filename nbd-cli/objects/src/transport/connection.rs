//! One connection to a server: requests, and the bytes of the replies.

use std::collections::VecDeque;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use hyper::body::Body as _;
use hyper::{Method, StatusCode};
use object_store::client::{HttpError, HttpErrorKind, HttpRequest};
use tokio::time::{Instant, sleep};

use super::failure::failed;
use super::head::{self, Head, not_http};
use super::stream::Stream;

/// Longest head of a reply, in bytes.
const HEAD_MAX: usize = 64 << 10;
/// Longest line between the chunks of a body, in bytes.
const LINE_MAX: usize = 8 << 10;
/// Longest part of a body that is copied behind the head of its request, in bytes.
const FIRST_MAX: usize = 16 << 10;
/// Bytes that are read at once for heads and lines. What comes with them is copied once more.
const READ_LEN: usize = 4 << 10;

/// A connection that is between two requests, or whose reply is being read.
#[derive(Debug)]
pub(super) struct Connection {
    stream: Stream,
    /// What came with the last head or line, from `start` on.
    input: Vec<u8>,
    start: usize,
}

impl Connection {
    pub(super) const fn new(stream: Stream) -> Self {
        Self { stream, input: Vec::new(), start: 0 }
    }

    /// Whether all bytes have been read that came with the last reply.
    pub(super) fn is_empty(&self) -> bool {
        self.start == self.input.len()
    }

    /// Whether the next request can be sent.
    pub(super) fn is_usable(&mut self) -> bool {
        self.is_empty() && self.stream.is_quiet()
    }

    /// Sends a request, and waits for the head of the reply. It may come before the request is
    /// sent completely; the connection is not kept then.
    pub(super) async fn send(
        &mut self,
        mut request: HttpRequest,
        idle: Duration,
    ) -> Result<Head, HttpError> {
        let is_bare = request.method() == Method::HEAD;
        let unsent = parts(&mut request)?;
        (self.input, self.start) = (Vec::new(), 0);
        self.stream.begin();
        let mut exchange = Exchange { connection: self, unsent, is_bare, moved: 0, is_cut: false };
        let mut patience = pin!(sleep(idle));
        std::future::poll_fn(|context| {
            let before = exchange.moved;
            if let Poll::Ready(head) = exchange.poll(context) {
                return Poll::Ready(head);
            }
            if exchange.moved > before {
                patience.as_mut().reset(Instant::now() + idle);
            }
            ready!(patience.as_mut().poll(context));
            let why = format!("the store has not moved a byte for {} s", idle.as_secs_f32());
            Poll::Ready(Err(failed(HttpErrorKind::Timeout, why)))
        })
        .await
    }

    /// Reads some bytes, of as many that have to come; none at the end of the connection.
    pub(super) fn poll_read(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let here = &self.input[self.start..];
        if here.is_empty() {
            let awaited = buffer.len();
            return self.stream.poll_read(context, buffer, awaited);
        }
        let length = here.len().min(buffer.len());
        buffer[..length].copy_from_slice(&here[..length]);
        self.start += length;
        Poll::Ready(Ok(length))
    }

    /// Returns whether some bytes have come, but too few to wake the reader. From now on each does.
    pub(super) fn has_few(&mut self) -> bool {
        self.stream.has_few()
    }

    /// Reads a line, without its end.
    pub(super) fn poll_line(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Vec<u8>, HttpError>> {
        loop {
            let here = &self.input[self.start..];
            if let Some(end) = here.iter().position(|byte| *byte == b'\n') {
                let line = here[..end].strip_suffix(b"\r").ok_or_else(not_http)?.to_vec();
                self.start += end + 1;
                return Poll::Ready(Ok(line));
            }
            if here.len() > LINE_MAX {
                return Poll::Ready(Err(not_http()));
            }
            self.input.drain(..std::mem::take(&mut self.start));
            if ready!(self.poll_more(context)).unwrap_or(0) == 0 {
                return Poll::Ready(Err(broken()));
            }
        }
    }

    /// Reads some bytes more for heads and lines.
    fn poll_more(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let length = self.input.len();
        self.input.resize(length + READ_LEN, 0);
        let read = self.stream.poll_read(context, &mut self.input[length..], 1);
        let count = if let Poll::Ready(Ok(count)) = &read { *count } else { 0 };
        self.input.truncate(length + count);
        read
    }
}

/// Returns a request as it is sent. What is small is one part.
fn parts(request: &mut HttpRequest) -> Result<VecDeque<Bytes>, HttpError> {
    let (mut first, mut parts) = (head::of_request(request), VecDeque::new());
    let mut context = Context::from_waker(std::task::Waker::noop());
    // It is all in memory.
    while let Poll::Ready(Some(frame)) = Pin::new(request.body_mut()).poll_frame(&mut context) {
        let data = frame?.into_data().unwrap_or_default();
        match parts.is_empty() && first.len() + data.len() <= FIRST_MAX {
            true => first.extend_from_slice(&data),
            false => parts.push_back(data),
        }
    }
    parts.push_front(Bytes::from(first));
    Ok(parts)
}

/// A request that is being sent, until the head of its reply has come.
struct Exchange<'a> {
    connection: &'a mut Connection,
    unsent: VecDeque<Bytes>,
    is_bare: bool,
    /// Bytes in both directions.
    moved: usize,
    /// The server takes no more; it may have said why.
    is_cut: bool,
}

impl Exchange<'_> {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Head, HttpError>> {
        self.poll_send(context);
        loop {
            if let Some(mut head) = self.head()? {
                head.is_kept &= self.unsent.is_empty() && !self.is_cut;
                return Poll::Ready(Ok(head));
            }
            match ready!(self.connection.poll_more(context)) {
                Ok(read) if read > 0 => self.moved += read,
                _ => return Poll::Ready(Err(broken())),
            }
        }
    }

    /// Sends as much as the connection takes.
    fn poll_send(&mut self, context: &mut Context<'_>) {
        while let Some(part) = self.unsent.front_mut() {
            if part.is_empty() {
                self.unsent.pop_front();
                continue;
            }
            match self.connection.stream.poll_write(context, part) {
                Poll::Pending => return,
                Poll::Ready(Ok(written)) if written > 0 => {
                    self.moved += written;
                    part.advance(written);
                }
                Poll::Ready(_) => {
                    self.is_cut = true;
                    self.unsent.clear();
                }
            }
        }
    }

    /// Returns the head of the reply if it has come.
    fn head(&mut self) -> Result<Option<Head>, HttpError> {
        let connection = &mut *self.connection;
        loop {
            match head::of_reply(&connection.input, self.is_bare)? {
                Some((head, _)) if head.parts.status == StatusCode::SWITCHING_PROTOCOLS => {
                    return Err(not_http());
                }
                // The reply follows (RFC 9110, section 15.2).
                Some((head, length)) if head.parts.status.is_informational() => {
                    connection.input.drain(..length);
                }
                Some((head, length)) => {
                    connection.start = length;
                    return Ok(Some(head));
                }
                None if connection.input.len() > HEAD_MAX => return Err(not_http()),
                None => return Ok(None),
            }
        }
    }
}

/// The error of a connection that was established.
pub(super) fn broken() -> HttpError {
    failed(HttpErrorKind::Interrupted, "the connection to the store broke")
}
