//! Detects clients that have left, or that stall.

use std::task::{Context, Poll};
use std::time::Duration;

use super::super::error::{Awaiting, ConnectionError};
use super::super::hangup::Hangup;
use super::super::socket::Socket;
use super::super::stall::{Movement, Stall};
use super::backlog::Backlog;
use super::incoming::Incoming;
use super::replies::Replies;
use super::throttle::Throttle;

/// Watches a client while nothing moves.
pub(super) struct Watch {
    stall: Stall,
    hangup: Hangup,
}

impl Watch {
    /// `limit` is the time for which a client may stall.
    pub(super) fn new(limit: Option<Duration>) -> Self {
        Self { stall: Stall::new(limit), hangup: Hangup::default() }
    }

    /// Called when nothing moves. Ready if the client has left and requests of it are in the pool
    /// or wait.
    pub(super) fn poll_hangup(
        &mut self,
        cx: &mut Context<'_>,
        socket: &Socket,
        (backlog, throttle): (&Backlog, &Throttle),
    ) -> Poll<Result<(), ConnectionError>> {
        if !backlog.is_in_pool() && !backlog.is_waiting() && !throttle.is_waiting() {
            return Poll::Pending;
        }
        // A client that has sent DISC may leave at once. Its writes are still carried out.
        self.hangup.poll(cx, || socket.has_hung_up()).map(|()| match backlog.has_farewell() {
            true => Ok(()),
            false => Err(ConnectionError::HungUp),
        })
    }

    /// Called when nothing moves. Ready if the client has stalled for too long. `awaiting` is its
    /// next action, if this connection holds resources until then.
    pub(super) fn poll_stall(
        &mut self,
        cx: &mut Context<'_>,
        awaiting: Option<Awaiting>,
        (incoming, replies, socket): (&Incoming, &Replies, &Socket),
    ) -> Poll<ConnectionError> {
        let Some(awaiting) = awaiting else {
            self.stall.settled();
            return Poll::Pending;
        };
        self.stall.poll(cx, awaiting, || {
            let (received, payload) = incoming.progress();
            let (sent, traffic) = (replies.total_sent(), socket.traffic());
            Movement { received, payload, sent, traffic }
        })
    }
}
