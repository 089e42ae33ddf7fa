//! The queue of requests of a connection.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Context, Poll};

use tokio::sync::mpsc;

use crate::error::Error;
use crate::inflight::Submission;

/// Capacity of the queue; callers wait when it is full.
pub(crate) const QUEUE_LEN: usize = 128;

/// A message from a client to the task of a connection.
#[derive(Debug)]
pub(crate) enum Message {
    Request(Submission),
    /// Answer the queued requests, send DISC and end.
    Disconnect,
}

/// The receiving end. It survives the replacement of a lost connection.
#[derive(Debug)]
pub(crate) struct Queue {
    receiver: mpsc::Receiver<Message>,
    /// Requests to be sent first: those sent on a lost connection, or put back.
    front: VecDeque<Submission>,
    closed: bool,
}

impl Queue {
    pub(crate) const fn new(receiver: mpsc::Receiver<Message>) -> Self {
        Self { receiver, front: VecDeque::new(), closed: false }
    }

    /// Takes the next request whose caller still waits. Returns `None` if there is none; then `cx`
    /// is woken when there may be one.
    pub(crate) fn take(&mut self, cx: &mut Context<'_>) -> Option<Submission> {
        loop {
            let next = match self.front.pop_front() {
                Some(next) => next,
                None => self.receive(cx)?,
            };
            if !next.is_abandoned() {
                return Some(next);
            }
        }
    }

    fn receive(&mut self, cx: &mut Context<'_>) -> Option<Submission> {
        while !self.closed {
            match self.receiver.poll_recv(cx) {
                Poll::Ready(Some(Message::Request(submission))) => return Some(submission),
                // Messages queued before the close are still delivered.
                Poll::Ready(Some(Message::Disconnect)) => self.receiver.close(),
                Poll::Ready(None) => self.closed = true,
                Poll::Pending => return None,
            }
        }
        None
    }

    pub(crate) fn put_back(&mut self, submission: Submission) {
        self.front.push_front(submission);
    }

    /// Returns true if no request is left and none can arrive.
    pub(crate) fn is_finished(&self) -> bool {
        self.closed && self.front.is_empty()
    }

    /// Waits for a request; returns false if none can arrive.
    pub(crate) async fn wait(&mut self) -> bool {
        let next = poll_fn(|cx| match self.take(cx) {
            Some(next) => Poll::Ready(Some(next)),
            None if self.closed => Poll::Ready(None),
            None => Poll::Pending,
        });
        let Some(next) = next.await else { return false };
        self.put_back(next);
        true
    }

    /// Ready once no caller waits for an answer and no new request can arrive. Until then requests
    /// are accepted while there is space.
    pub(crate) fn poll_abandoned(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.front.retain(|submission| !submission.is_abandoned());
        while self.front.len() < QUEUE_LEN {
            match self.receive(cx) {
                Some(next) if next.is_abandoned() => {}
                Some(next) => self.front.push_back(next),
                None if self.is_finished() => return Poll::Ready(()),
                None => break,
            }
        }
        Poll::Pending
    }

    /// Refuses the requests that wait now; later ones are accepted.
    pub(crate) fn fail_waiting(&mut self, error: &Error) {
        for submission in self.front.drain(..) {
            submission.fail(error.clone());
        }
        // As many as there is room for: callers may repeat theirs at once.
        for _ in 0..QUEUE_LEN {
            match self.receiver.try_recv() {
                Ok(Message::Request(submission)) => submission.fail(error.clone()),
                Ok(Message::Disconnect) => self.receiver.close(),
                Err(_) => break,
            }
        }
    }

    /// Refuses all requests from now on.
    pub(crate) fn fail(mut self, error: &Error) {
        self.receiver.close();
        for submission in self.front.drain(..) {
            submission.fail(error.clone());
        }
        while let Ok(message) = self.receiver.try_recv() {
            if let Message::Request(submission) = message {
                submission.fail(error.clone());
            }
        }
    }
}
