//! The body of a reply: with time limits, and never longer than what was asked for.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use object_store::client::{HttpError, HttpErrorKind};
use tokio::time::{Instant, Sleep, sleep_until};

use super::connection::{Connection, broken};
use super::failure::failed;

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

/// The body of a reply.
pub(super) struct ReplyBody {
    body: Incoming,
    /// Until the end of the body.
    connection: Option<(Connection, Back)>,
    limits: BodyLimits,
    received: u64,
    patience: Pin<Box<Sleep>>,
}

impl ReplyBody {
    pub(super) fn new(
        body: Incoming,
        connection: Connection,
        limits: BodyLimits,
        back: Back,
    ) -> Self {
        let patience = Box::pin(sleep_until(limits.wait()));
        let connection = Some((connection, back));
        let mut reply = Self { body, connection, limits, received: 0, patience };
        reply.finish_if_ended();
        reply
    }

    fn finish_if_ended(&mut self) {
        if self.body.is_end_stream()
            && let Some((connection, back)) = self.connection.take()
        {
            back(connection);
        }
    }

    fn poll_data(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        // A store that always has data does not come to the wait.
        let is_late = Instant::now() >= self.limits.deadline;
        match frame {
            Poll::Ready(Some(Ok(_))) if is_late => {}
            Poll::Ready(frame) => return Poll::Ready(frame.map(|frame| frame.map_err(broken))),
            Poll::Pending => ready!(self.patience.as_mut().poll(context)),
        }
        let why = match Instant::now() < self.limits.deadline {
            true => format!("the store has sent nothing for {} s", self.limits.idle.as_secs_f32()),
            false => "the reply has taken longer than a request may".to_owned(),
        };
        Poll::Ready(Some(Err(failed(HttpErrorKind::Timeout, why))))
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        let frame = ready!(self.poll_data(context));
        match &frame {
            None => {
                if let Some((connection, back)) = self.connection.take() {
                    back(connection);
                }
            }
            Some(Err(_)) => drop(self.connection.take()),
            Some(Ok(frame)) => {
                self.received += frame.data_ref().map_or(0, |data| data.len() as u64);
                if self.received > self.limits.length {
                    drop(self.connection.take());
                    let why = "the store sends more than it was asked for";
                    return Poll::Ready(Some(Err(failed(HttpErrorKind::Decode, why))));
                }
                let next = self.limits.wait();
                self.patience.as_mut().reset(next);
                self.finish_if_ended();
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
