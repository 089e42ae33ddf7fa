//! The work of a server, from its first client to its end.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinSet;

use crate::access::Access;
use crate::config::ServerConfig;
use crate::connection::Socket;
use crate::error::{ServeError, system_words};
use crate::export::{Export, ExportRegistry};
use crate::listener::Listener;
use crate::paused::{Continued, Paused, PausedListener, Resting};
use crate::running::Ending;
use crate::shutdown::{Phase, ShutdownTrigger};
use crate::worker::{Accepted, Workers};

/// A server that accepts clients.
pub(crate) struct Serving {
    pub(crate) config: Arc<ServerConfig>,
    pub(crate) exports: ExportRegistry,
    pub(crate) access: Access,
    pub(crate) trigger: ShutdownTrigger,
    pub(crate) workers: Workers,
    pub(crate) clients: mpsc::Receiver<Accepted>,
    pub(crate) acceptors: JoinSet<Listener>,
    pub(crate) resting: Resting,
    pub(crate) resumed: Vec<(OwnedFd, Continued, OwnedSemaphorePermit)>,
}

impl Serving {
    /// Serves until `ending` is ready, and then ends in order. Returns the state after a pause.
    pub(crate) async fn run(
        mut self,
        ending: impl Future<Output = Ending>,
    ) -> Result<Option<Paused>, ServeError> {
        let mut ending = std::pin::pin!(ending);
        self.resume()?;
        let ending = loop {
            tokio::select! {
                ending = &mut ending => break ending,
                Some(accepted) = self.clients.recv() => self.workers.serve(accepted)?,
            }
        };
        // Exports that only clients hold are dropped with them.
        let unregistered = unregistered(&self.exports, &self.access);
        let mut listeners = Vec::new();
        match ending {
            Ending::Shutdown => {
                tracing::info!("stopping: no new clients, finishing what is in flight");
                self.trigger.announce(Phase::Draining);
                // Dropping the listeners removes the sockets' files.
                self.clients.close();
                while self.acceptors.join_next().await.is_some() {}
            }
            Ending::Pause => {
                tracing::info!("pausing: no new clients, finishing what has begun");
                self.trigger.announce(Phase::Pausing);
                listeners = self.stop_accepting().await?;
            }
        }
        let workers = self.workers;
        let ended = tokio::task::spawn_blocking(move || workers.join());
        let mut ended = std::pin::pin!(ended);
        if tokio::time::timeout(self.config.drain_timeout, &mut ended).await.is_err() {
            self.trigger.announce(Phase::Aborting);
            let _ = ended.await;
        }
        let (failed, flushed) = flush_all(&self.exports, &self.access, unregistered).await;
        match ending {
            Ending::Shutdown => flushed.map(|()| None),
            Ending::Pause => {
                let connections = self.resting.take(&self.exports, &failed);
                Ok(Some(Paused { listeners, connections, flushed }))
            }
        }
    }

    /// Continues the connections of a paused server.
    fn resume(&mut self) -> Result<(), ServeError> {
        for (socket, continued, place) in std::mem::take(&mut self.resumed) {
            match Socket::from_descriptor(socket) {
                Ok(socket) => self.workers.serve(Accepted {
                    peer: socket.peer_name(),
                    socket,
                    place,
                    ungreeted: None,
                    continued: Some(Box::new(continued)),
                })?,
                Err(error) => {
                    tracing::warn!(error = system_words(&error), "connection not continued");
                }
            }
        }
        Ok(())
    }

    /// Stops accepting, and waits for that; clients that were accepted before still get a worker.
    async fn stop_accepting(&mut self) -> Result<Vec<PausedListener>, ServeError> {
        let mut listeners = Vec::new();
        loop {
            tokio::select! {
                stopped = self.acceptors.join_next() => match stopped {
                    Some(Ok(listener)) => match listener.pause() {
                        Ok(paused) => listeners.push(paused),
                        Err(error) => {
                            tracing::error!(error = system_words(&error), "cannot keep a listener");
                        }
                    },
                    Some(Err(_)) => {}
                    None => break,
                },
                Some(accepted) = self.clients.recv() => self.workers.serve(accepted)?,
            }
        }
        self.clients.close();
        while let Ok(accepted) = self.clients.try_recv() {
            self.workers.serve(accepted)?;
        }
        Ok(listeners)
    }
}

type Named = (String, Arc<dyn Export>);

/// Exports that clients may use and that are not in the registry: resolved and removed ones.
fn unregistered(exports: &ExportRegistry, access: &Access) -> Vec<Named> {
    exports.removed().into_iter().chain(access.resolved()).collect()
}

/// Flushes the registered exports, those that were `unregistered` before, and those that are now.
/// Returns those that have failed, and the first error.
async fn flush_all(
    exports: &ExportRegistry,
    access: &Access,
    before: Vec<Named>,
) -> (Vec<Arc<dyn Export>>, Result<(), ServeError>) {
    let registered = exports.entries();
    let mut all: Vec<Named> =
        registered.into_iter().map(|(name, entry)| (name, Arc::clone(entry.export()))).collect();
    for (name, export) in before.into_iter().chain(unregistered(exports, access)) {
        if !all.iter().any(|(_, known)| Arc::ptr_eq(known, &export)) {
            all.push((name, export));
        }
    }
    // At once: one that hangs must not keep the others from being durable.
    let flush = |(name, export): Named| {
        let flushed = Arc::clone(&export);
        (name, export, tokio::task::spawn_blocking(move || flushed.flush()))
    };
    let flushing: Vec<_> = all.into_iter().map(flush).collect();
    let (mut failed, mut first) = (Vec::new(), None);
    for (name, export, flushed) in flushing {
        let message = match flushed.await {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error.message.into_owned(),
            Err(error) if error.is_panic() => "the export panicked".to_owned(),
            Err(error) => error.to_string(),
        };
        tracing::error!(export = %name, %message, "flush at the end failed");
        first.get_or_insert(ServeError::Flush { export: name, message });
        failed.push(export);
    }
    (failed, first.map_or(Ok(()), Err))
}
