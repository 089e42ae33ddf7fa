//! The body of a reply: with time limits, and never longer than what was asked for.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use object_store::client::{HttpError, HttpErrorKind};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::spare::Spare;

use super::chunks::Chunks;
use super::connection::{Connection, broken};
use super::failure::failed;
use super::head::Framing;

/// Longest reply to requests without a range, in bytes: lists, results and whole objects. They are
/// kept in memory.
pub(crate) const WHOLE_MAX: u64 = 512 << 20;

/// What a body may do.
#[derive(Clone, Copy, Debug)]
pub(super) struct BodyLimits {
    /// Time without a byte.
    pub(super) idle: Duration,
    /// The end of the request.
    pub(super) deadline: Instant,
    /// Longest body, in bytes.
    pub(super) length: u64,
}

impl BodyLimits {
    fn wait(&self) -> Instant {
        (Instant::now() + self.idle).min(self.deadline)
    }
}

/// Takes a connection back when the body has been read.
type Back = Box<dyn FnOnce(Connection) + Send + Sync>;

/// The body of a reply. It is read by those who poll it, as long parts as there are: in full
/// buffers, but for the last one.
pub(super) struct ReplyBody {
    /// Until the end of the body.
    connection: Option<(Connection, Back)>,
    left: Left,
    is_kept: bool,
    /// What has been read of the next part.
    buffer: Vec<u8>,
    filled: usize,
    /// Whether the time limit is that of a wait for this part.
    is_waiting: bool,
    /// What comes after the next part.
    failure: Option<HttpError>,
    limits: BodyLimits,
    received: u64,
    patience: Pin<Box<Sleep>>,
    spare: Arc<Spare>,
}

/// What has not been read.
#[derive(Debug)]
enum Left {
    Length(u64),
    Chunks(Chunks),
    UntilClose,
}

impl ReplyBody {
    pub(super) fn new(
        head: (Framing, bool),
        connection: Connection,
        limits: BodyLimits,
        spare: Arc<Spare>,
        back: Back,
    ) -> Self {
        let left = match head.0 {
            Framing::Length(length) => Left::Length(length),
            Framing::Chunked => Left::Chunks(Chunks::default()),
            Framing::Close => Left::UntilClose,
        };
        let mut reply = Self {
            connection: Some((connection, back)),
            left,
            is_kept: head.1,
            buffer: Vec::new(),
            filled: 0,
            is_waiting: false,
            failure: None,
            limits,
            received: 0,
            patience: Box::pin(sleep_until(limits.wait())),
            spare,
        };
        if matches!(reply.left, Left::Length(0)) {
            reply.end();
        }
        reply
    }

    /// Hands the connection back. One that has more than the reply is closed.
    fn end(&mut self) {
        if let Some((connection, back)) = self.connection.take()
            && self.is_kept
            && connection.is_empty()
        {
            back(connection);
        }
    }

    /// Reads into the buffer until it is full, or the body has ended or failed.
    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.buffer.is_empty() {
            self.buffer = self.spare.take();
        }
        let before = self.filled;
        while let Some((connection, _)) = &mut self.connection
            && self.failure.is_none()
            && self.filled < self.buffer.len()
        {
            let read = self.left.poll_read(context, connection, &mut self.buffer[self.filled..]);
            match read {
                Poll::Ready(Ok(read)) => {
                    self.filled += read;
                    if read == 0 || matches!(self.left, Left::Length(0)) {
                        self.end();
                    }
                }
                Poll::Ready(Err(error)) => self.failure = Some(error),
                Poll::Pending => {
                    // The caller may have taken its time.
                    if !std::mem::replace(&mut self.is_waiting, true) || self.filled > before {
                        let next = self.limits.wait();
                        self.patience.as_mut().reset(next);
                    }
                    ready!(self.patience.as_mut().poll(context));
                    let is_late = Instant::now() >= self.limits.deadline;
                    if !is_late && self.connection.as_mut().is_some_and(|(it, _)| it.has_few()) {
                        let next = self.limits.wait();
                        self.patience.as_mut().reset(next);
                        continue;
                    }
                    self.failure = Some(self.too_late());
                }
            }
        }
        // A store that always has data does not come to the wait.
        if self.failure.is_none() && Instant::now() >= self.limits.deadline {
            self.failure = Some(self.too_late());
        }
        Poll::Ready(())
    }

    fn too_late(&self) -> HttpError {
        let why = match Instant::now() < self.limits.deadline {
            true => format!("the store has sent nothing for {} s", self.limits.idle.as_secs_f32()),
            false => "the reply has taken longer than a request may".to_owned(),
        };
        failed(HttpErrorKind::Timeout, why)
    }

    /// Takes what was read.
    fn part(&mut self) -> Bytes {
        let length = std::mem::take(&mut self.filled);
        self.is_waiting = false;
        // Short ones may be kept for long.
        if length < self.buffer.len() / 2 {
            return Bytes::copy_from_slice(&self.buffer[..length]);
        }
        self.spare.lend(std::mem::take(&mut self.buffer), length)
    }
}

impl Left {
    /// Reads some bytes; none at the end of the body.
    fn poll_read(
        &mut self,
        context: &mut Context<'_>,
        connection: &mut Connection,
        buffer: &mut [u8],
    ) -> Poll<Result<usize, HttpError>> {
        match self {
            Self::Length(left) => {
                let most =
                    usize::try_from(*left).map_or(buffer.len(), |left| left.min(buffer.len()));
                let read = ready!(connection.poll_read(context, &mut buffer[..most]));
                let read = read.ok().filter(|read| *read > 0).ok_or_else(broken)?;
                *left = left.saturating_sub(read as u64);
                Poll::Ready(Ok(read))
            }
            Self::Chunks(chunks) => chunks.poll_read(context, connection, buffer),
            Self::UntilClose => {
                connection.poll_read(context, buffer).map(|read| read.map_err(|_| broken()))
            }
        }
    }
}

impl Drop for ReplyBody {
    fn drop(&mut self) {
        self.spare.put(std::mem::take(&mut self.buffer));
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        if self.connection.is_some() && self.failure.is_none() {
            ready!(self.poll_fill(context));
        }
        if self.filled > 0 {
            let part = self.part();
            self.received += part.len() as u64;
            if self.received <= self.limits.length {
                return Poll::Ready(Some(Ok(Frame::data(part))));
            }
            let why = "the store sends more than it was asked for";
            self.failure = Some(failed(HttpErrorKind::Decode, why));
        }
        if self.failure.is_some() {
            drop(self.connection.take());
        }
        Poll::Ready(self.failure.take().map(Err))
    }

    fn is_end_stream(&self) -> bool {
        self.connection.is_none() && self.failure.is_none() && self.filled == 0
    }

    fn size_hint(&self) -> SizeHint {
        match self.left {
            Left::Length(left) => SizeHint::with_exact(left.saturating_add(self.filled as u64)),
            _ => SizeHint::default(),
        }
    }
}
