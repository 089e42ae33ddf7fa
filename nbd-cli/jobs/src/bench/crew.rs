//! The connections of one thread.
//!
//! A thread for each connection would sleep and be woken for every few replies, which costs the
//! client and the server more than the replies themselves.

use std::cell::Cell;
use std::time::Instant;

use super::channel::{PATIENCE, interest, patience, wait_for};
use super::source::Source;
use super::worker::{Waiting, Worker};
use crate::error::JobError;

/// A connection and its task.
pub(super) struct Member {
    /// The number of the connection.
    index: usize,
    worker: Worker,
    source: Source,
    waiting: Waiting,
    /// Whether its socket has something to receive, or room for what is not sent.
    is_ready: Cell<bool>,
}

/// A connection that is done: its number, and how that ended.
pub(super) type Done = (usize, Worker, Result<(), JobError>);

impl Member {
    pub(super) fn new(index: usize, worker: Worker, source: Source) -> Self {
        let waiting = Waiting::UntilDue(Instant::now());
        Self { index, worker, source, waiting, is_ready: Cell::new(false) }
    }

    /// The time at which its next request is due, if it waits for that.
    fn due(&self) -> Option<Instant> {
        match self.waiting {
            Waiting::ForNothing | Waiting::ForReplies(None) => None,
            Waiting::ForReplies(Some(due)) | Waiting::UntilDue(due) => Some(due),
        }
    }

    /// Takes replies, makes requests and sends them, without waiting.
    fn step(&mut self) -> Result<(), JobError> {
        if let Waiting::ForReplies(_) = self.waiting {
            self.worker.receive_now()?;
        }
        self.waiting = self.worker.prepare(&mut self.source)?;
        self.worker.send_now()
    }

    fn end(mut self, result: Result<(), JobError>) -> Done {
        self.worker.publish();
        if result.is_err() {
            self.worker.end_all();
        }
        (self.index, self.worker, result)
    }
}

/// Divides connections among `threads` threads. A stream under TLS has its own: it waits by itself.
pub(super) fn divide(members: Vec<Member>, threads: usize) -> Vec<Vec<Member>> {
    let (sockets, streams): (Vec<_>, Vec<_>) =
        members.into_iter().partition(|member| member.worker.channel.socket().is_some());
    let mut crews: Vec<Vec<Member>> = streams.into_iter().map(|member| vec![member]).collect();
    let each = sockets.len().div_ceil(threads.max(1)).max(1);
    let mut sockets = sockets.into_iter().peekable();
    while sockets.peek().is_some() {
        crews.push(sockets.by_ref().take(each).collect());
    }
    crews
}

/// Has the connections make the requests of their sources until all are done. While one of them is
/// made again after it was lost, the others wait.
pub(super) fn drive(mut crew: Vec<Member>) -> Vec<Done> {
    let mut done = Vec::with_capacity(crew.len());
    if let [member] = crew.as_mut_slice() {
        let result = member.worker.drive(&mut member.source);
        done.extend(crew.pop().map(|member| member.end(result)));
    }
    let mut told = Instant::now();
    loop {
        let now = Instant::now();
        // Those that wait look now and then whether they have waited for too long, or are to end.
        let is_time = now.duration_since(told) >= PATIENCE;
        if is_time {
            told = now;
        }
        let mut position = 0;
        while let Some(member) = crew.get_mut(position) {
            let steps =
                member.is_ready.get() || is_time || member.due().is_some_and(|due| due <= now);
            let result = if steps { member.step() } else { Ok(()) };
            if result.is_ok() && !matches!(member.waiting, Waiting::ForNothing) {
                position += 1;
            } else {
                done.push(crew.swap_remove(position).end(result));
            }
        }
        if crew.is_empty() {
            return done;
        }
        wait(&crew);
    }
}

/// Waits until there is something to do, at most for [`PATIENCE`].
fn wait(crew: &[Member]) {
    let due = crew.iter().filter_map(Member::due);
    let time = patience(due.min());
    let sockets = crew.iter().filter_map(|member| {
        let socket = member.worker.channel.socket()?;
        Some(interest(socket, &member.worker.out))
    });
    let mut sockets: Vec<_> = sockets.collect();
    let waited = wait_for(&mut sockets, time);
    for (member, socket) in crew.iter().zip(&sockets) {
        // After an error, each looks for itself.
        member.is_ready.set(waited.is_err() || !socket.revents().is_empty());
    }
}
