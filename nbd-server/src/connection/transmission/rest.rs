//! Stops a connection between two requests, so that another server can continue it.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use nbd_proto::transmission::{Request, SavedConnection};

use super::Session;
use crate::connection::error::ConnectionError;
use crate::connection::socket::Socket;
use crate::connection::writeback_errors::WritebackErrors;
use crate::statistics::Outcome;

/// A connection between two requests.
pub(in crate::connection) struct Rest {
    pub(in crate::connection) socket: Socket,
    /// The state, except for `owes_failure`: flushes of other clients may still fail.
    pub(in crate::connection) state: SavedConnection,
    pub(in crate::connection) writeback: Arc<WritebackErrors>,
}

impl Session {
    /// Begins no further request, and waits until those that have begun are answered and their
    /// replies are sent. Returns the state to continue from; `None` if the connection is over.
    pub(super) async fn rest(mut self) -> Result<Option<Rest>, ConnectionError> {
        let waiting = self.backlog.take_waiting_for_payload();
        if let Some(rejection) = self.incoming.take_rejection() {
            self.tally.answer(rejection.tag.command.into(), 0, Outcome::Failure);
            self.replies.refuse(rejection);
        }
        poll_fn(|cx| {
            let rested = self.poll_rest(cx);
            self.backlog.start_ring();
            rested
        })
        .await?;
        if self.incoming.is_closed() {
            return Ok(None);
        }
        let state = self.save(waiting.as_ref());
        let writeback = Arc::clone(self.target.writeback());
        Ok(Some(Rest { socket: self.socket, state, writeback }))
    }

    fn save(&self, waiting: Option<&Request>) -> SavedConnection {
        let (received, discard) = self.incoming.save(waiting);
        SavedConnection {
            negotiated: self.negotiated.clone(),
            received,
            discard,
            owes_failure: false,
        }
    }

    /// As `poll`, for the requests that have begun.
    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        loop {
            self.turn.rest();
            let mut progress = self.collect(cx);
            progress |= self.finish_begun(cx);
            progress |= self.flush(cx)? || self.turn.is_over();
            if !progress {
                if self.backlog.is_empty() && self.is_all_sent() {
                    return Poll::Ready(Ok(()));
                }
                return Poll::Pending;
            }
        }
    }
}
