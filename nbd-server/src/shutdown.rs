//! Propagates the end of the server, or a pause, to every connection.

use tokio::sync::watch;

/// The state of the server, as connections are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Continue.
    Serving,
    /// Stop between two requests, to be continued by another server.
    Pausing,
    /// Accept no new requests, complete the received ones.
    Draining,
    /// Close at once.
    Aborting,
}

/// The sending side, held by the server.
#[derive(Debug)]
pub(crate) struct ShutdownTrigger {
    phase: watch::Sender<Phase>,
}

/// The receiving side, one for each connection and listener.
#[derive(Debug, Clone)]
pub(crate) struct Shutdown {
    phase: watch::Receiver<Phase>,
}

impl ShutdownTrigger {
    pub(crate) fn new() -> Self {
        Self { phase: watch::Sender::new(Phase::Serving) }
    }

    pub(crate) fn subscribe(&self) -> Shutdown {
        Shutdown { phase: self.phase.subscribe() }
    }

    pub(crate) fn announce(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }
}

impl Shutdown {
    /// Whether the server is in `phase` now.
    pub(crate) fn is_in(&self, phase: Phase) -> bool {
        *self.phase.borrow() == phase
    }

    /// Waits until the server is at least in `phase`. A dropped server counts as aborting.
    pub(crate) async fn reached(&mut self, phase: Phase) {
        // An error means that the sender was dropped.
        let _ = self.phase.wait_for(|now| *now >= phase).await;
    }
}
