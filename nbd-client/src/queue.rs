//! Requests that wait for a connection.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Context, Poll};

use tokio::sync::mpsc;

use crate::error::Error;
use crate::inflight::Submission;

/// Requests that wait in front of a connection before their callers have to.
pub(crate) const QUEUE_LEN: usize = 128;

/// What a client sends to the task of a connection.
#[derive(Debug)]
pub(crate) enum Message {
    Request(Submission),
    /// Answer what is queued, say goodbye and end.
    Disconnect,
}

/// The receiving end. It outlives a connection that is lost and replaced.
#[derive(Debug)]
pub(crate) struct Queue {
    receiver: mpsc::Receiver<Message>,
    /// Requests that go first: sent before on a connection that was lost, or put back.
    front: VecDeque<Submission>,
    closed: bool,
}

impl Queue {
    pub(crate) const fn new(receiver: mpsc::Receiver<Message>) -> Self {
        Self { receiver, front: VecDeque::new(), closed: false }
    }

    /// Takes the next request that somebody still waits for. Without one, `None`, and `cx` is
    /// woken when there may be one.
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
                // What was queued before still comes, then the end.
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

    /// True if no request is left and none will come.
    pub(crate) fn is_finished(&self) -> bool {
        self.closed && self.front.is_empty()
    }

    /// Waits for a request; false if none will come.
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

    /// Ready once nobody waits for an answer any more and nobody can ask. Until then requests are
    /// taken in, as far as there is room.
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

    /// Refuses everything from now on.
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
