//! Propagates the end of the server to every connection.

use tokio::sync::watch;

/// What connections are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Continue.
    Serving,
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
    /// Waits until the server is at least in `phase`. A server that is gone counts as aborting.
    pub(crate) async fn reached(&mut self, phase: Phase) {
        // An error means that the sender is gone.
        let _ = self.phase.wait_for(|now| *now >= phase).await;
    }
}
