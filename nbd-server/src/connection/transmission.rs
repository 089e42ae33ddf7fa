//! The transmission phase of one connection: receive, execute, send.
//!
//! One task does all of it. It takes as many requests as the receive buffer holds, answers those at
//! once that need no waiting (from the page cache, from memory), hands the others to the pool, and
//! sends several replies together. Replies are sent in the order in which they are ready.

mod backlog;
mod disk_wait;
mod execute;
mod incoming;
mod portion;
mod read;
mod replies;
mod rest;
mod target;
mod throttle;
mod watch;

use std::future::poll_fn;
use std::task::{Context, Poll, ready};

use nbd_proto::handshake::Negotiated;

use super::error::{Awaiting, ConnectionError};
use super::handshake::Established;
use super::plain::Channel;
use super::polling::Polling;
use super::read_strategy::{Idle, ReadStrategy};
use super::room::Room;
use super::shared::Shared;
use super::socket::Socket;
use super::turn::{BARREN_COST, Thread, Turn};
use crate::shutdown::{Phase, Shutdown};
use crate::statistics::Tally;
use backlog::Backlog;
use disk_wait::DiskWait;
use incoming::{Incoming, Received};
use portion::Portion;
use read::PromptReads;
use replies::Replies;
pub(super) use rest::Rest;
use target::Target;
use throttle::Throttle;
use watch::Watch;

/// One connection after its handshake.
pub(super) struct Session {
    socket: Socket,
    target: Target,
    incoming: Incoming,
    reads: PromptReads,
    backlog: Backlog,
    replies: Replies,
    portion: Portion,
    room: Room,
    read_strategy: ReadStrategy,
    disk_wait: DiskWait,
    throttle: Throttle,
    watch: Watch,
    turn: Turn,
    tally: Tally,
    negotiated: Negotiated,
}

impl Session {
    pub(super) fn new(
        established: Established,
        shared: &Shared,
        thread: Thread,
        tally: Tally,
    ) -> Self {
        let polling = Polling::new(shared.slots.clone(), shared.config.busy_poll);
        let target = Target::new(&established);
        Self {
            incoming: Incoming::new(&established),
            reads: PromptReads::new(),
            backlog: Backlog::new(&established, shared, &thread.ring),
            replies: Replies::new(target.encoder()),
            portion: Portion::default(),
            room: Room::new(shared.room.clone()),
            read_strategy: ReadStrategy::new(polling, thread.connections.clone()),
            disk_wait: DiskWait::new(shared.disk_slots.clone(), thread.connections.clone()),
            watch: Watch::new(shared.config.stall_timeout),
            turn: Turn::new(thread),
            throttle: Throttle::new(established.granted.admission),
            target,
            tally,
            socket: established.socket,
            negotiated: established.negotiated,
        }
    }

    /// Serves until the client leaves or the server ends, and every reply is sent. If the server is
    /// paused, returns the state that another server needs to continue.
    pub(super) async fn run(
        mut self,
        mut shutdown: Shutdown,
    ) -> Result<Option<Rest>, ConnectionError> {
        tokio::select! {
            biased;
            result = poll_fn(|cx| self.poll_and_start(cx)) => {
                result?;
                self.say_goodbye().await;
                return Ok(None);
            }
            () = shutdown.reached(Phase::Pausing) => {}
        }
        // Another process cannot continue an encrypted connection.
        if shutdown.is_in(Phase::Pausing) && self.socket.channel() == Channel::Clear {
            return self.rest().await;
        }
        // Requests that have arrived completely are finished. The server does not wait for the rest
        // of a payload.
        self.throttle.open();
        poll_fn(|cx| {
            let drained = self.poll_drain(cx);
            self.backlog.start_ring();
            drained
        })
        .await?;
        self.say_goodbye().await;
        Ok(None)
    }

    /// Ends an encrypted stream, if the client receives the message at once. It may have left.
    async fn say_goodbye(&mut self) {
        self.socket.begin_shutdown();
        poll_fn(|cx| Poll::Ready(self.socket.poll_flush(cx).is_ready())).await;
    }

    /// As [`poll`](Self::poll), and then submits the reads and writes that were queued for the
    /// ring, all at once.
    fn poll_and_start(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        let polled = self.poll(cx);
        self.backlog.start_ring();
        polled
    }

    /// Runs rounds until nothing moves any more or others get their turn.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        ready!(self.turn.poll(cx));
        loop {
            let mut progress = self.collect(cx);
            progress |= self.execute(cx)?;
            let made_room = self.flush(cx)?;
            if self.is_over() {
                return Poll::Ready(Ok(()));
            }
            // Received requests come first: the buffer may have no space for more, and the end of
            // the stream must not overtake the requests before it.
            progress |= made_room || self.turn.is_over() || self.receive(cx)?;
            if !progress {
                self.turn.rest();
                self.give_room_back();
                return self.poll_watch(cx);
            }
            if self.turn.ends_with_round() {
                // Others of this thread, and the end of the server, get their turn.
                self.turn.pass_on(cx);
                return Poll::Pending;
            }
        }
    }

    /// As `poll`, without receiving.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        loop {
            self.turn.rest();
            let mut progress = self.collect(cx);
            progress |= self.execute(cx)?;
            progress |= self.flush(cx)? || self.turn.is_over();
            if !progress {
                if self.backlog.is_empty() && self.is_all_sent() {
                    return Poll::Ready(Ok(()));
                }
                return Poll::Pending;
            }
        }
    }

    /// Returns large buffers. Called when nothing moves: an idle connection does not need them.
    fn give_room_back(&mut self) {
        if self.is_idle() && self.room.offer() {
            self.replies.shrink();
            self.incoming.shrink();
        }
    }

    /// Called when nothing moves. Ready if the client has left, or has delayed its part for too
    /// long.
    fn poll_watch(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        let held = (&self.backlog, &self.throttle);
        if let Poll::Ready(end) = self.watch.poll_hangup(cx, &self.socket, held) {
            return Poll::Ready(end);
        }
        let awaiting = self.awaiting();
        let parts = (&self.incoming, &self.replies, &self.socket);
        self.watch.poll_stall(cx, awaiting, parts).map(Err)
    }

    /// Returns what the client has to do next, if this connection holds resources until it does.
    fn awaiting(&self) -> Option<Awaiting> {
        if !self.is_all_sent() {
            return Some(Awaiting::TakeReplies);
        }
        let is_waited_for =
            !self.backlog.is_waiting() && !self.throttle.is_waiting() && !self.is_busy();
        (is_waited_for && self.incoming.is_partial()).then_some(Awaiting::SendRest)
    }

    fn is_over(&self) -> bool {
        self.incoming.is_closed() && self.backlog.is_empty() && self.is_all_sent()
    }

    fn is_all_sent(&self) -> bool {
        self.replies.are_sent(&self.socket)
    }

    /// Returns whether everything is sent and nothing is in the pool.
    fn is_idle(&self) -> bool {
        self.is_all_sent() && !self.backlog.is_in_pool()
    }

    /// Returns whether this connection has as many requests under way as it may.
    fn is_busy(&self) -> bool {
        self.replies.are_many(&self.room) || self.backlog.is_full()
    }

    /// Takes replies from the pool.
    fn collect(&mut self, cx: &mut Context<'_>) -> bool {
        let mut progress = false;
        while let Poll::Ready((bytes, permit, answered)) = self.backlog.poll_reply(cx) {
            let (copied, memory) = self.replies.push(bytes, permit);
            self.turn.spend(copied);
            self.backlog.give_back(memory);
            self.tally.answer_later(answered);
            progress = true;
        }
        progress
    }

    /// Sends; true if that allows further requests.
    fn flush(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        let was_busy = self.is_busy();
        self.replies.flush(cx, &mut self.socket, &mut self.turn)?;
        Ok(was_busy && !self.is_busy())
    }

    /// Reads from the socket, if the received bytes can be used.
    fn receive(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        let is_waiting = self.backlog.is_waiting() || self.throttle.is_waiting();
        if is_waiting || self.is_busy() || self.incoming.is_closed() {
            return Ok(false);
        }
        let idle = if self.is_idle() { Idle::Yes } else { Idle::No };
        let strategy = (&mut self.read_strategy, idle);
        match self.incoming.poll_receive(
            cx,
            &mut self.socket,
            &mut self.room,
            &mut self.turn,
            strategy,
        )? {
            Poll::Pending => {
                // Messages of TLS cost time as well.
                let barren = self.socket.take_barren();
                self.turn.spend(barren.saturating_mul(BARREN_COST));
                Ok(barren > 0)
            }
            Poll::Ready(Received::Bytes) => {
                self.tally.received();
                Ok(true)
            }
            Poll::Ready(Received::End) => {
                // The client has left, or has finished sending and may still receive replies.
                self.incoming.close();
                Ok(true)
            }
        }
    }
}
