//! The object that carries out the requests of a control socket.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use imgfmt::Format;
use nbd_server::ServerHandle;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::{Mutex, MutexGuard, Notify, OwnedMutexGuard};

use super::closed::{LOOK, TIME_TO_CLOSE, refuse_removed};
use super::disks::{ConnectionId, ServedDisk, ServedDisks, Turn, not_found, still_working};
use super::event::{ControlEvent, ControlObserver, ignore};
use super::files::check_names;
use super::openings::{OpeningGuard, Openings};
use super::streaming::TIME_TO_STOP;
use crate::control::{ErrorKind, Failure, Outcome};
use crate::opening::within;
use crate::tasks;

/// The directory of files for data that is overwritten during a checkpoint: not one in memory.
const TEMPORARY_DIRECTORY: &str = "/var/tmp";

/// The time for an earlier request about a disk, and for its writes in flight when a checkpoint is
/// started: guests give a disk up that does not answer for 30 s.
const PATIENCE: Duration = Duration::from_secs(10);
/// The time for a look at the bitmaps of all disks, beside each other.
const TIME_TO_LOOK: Duration = Duration::from_secs(2);

/// A source that a client asks to export.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RequestedSource {
    /// The name of the export.
    pub name: String,
    /// Its name, in a notation of the server's choice.
    pub source: String,
    /// Refuse all writes.
    pub read_only: bool,
    /// Format of the image; detected unless given.
    pub format: Option<Format>,
}

type OpenSource = dyn Fn(&RequestedSource) -> Result<ServedDisk, Failure> + Send + Sync;
/// The result of reading the configuration again.
pub type Reloading = Pin<Box<dyn Future<Output = Result<Value, Failure>> + Send>>;
type Reload = dyn Fn() -> Reloading + Send + Sync;
type UrisOf = dyn Fn(&str) -> Vec<String> + Send + Sync;

/// Executes the requests of a control socket, those about one disk one at a time.
pub struct Controller {
    pub(super) server: ServerHandle,
    /// Never held while a disk is used, which may hang.
    pub(super) disks: Mutex<ServedDisks>,
    pub(super) open: Arc<OpenSource>,
    /// Zero for no limit.
    open_timeout: std::sync::Mutex<Duration>,
    pub(super) uris: Box<UrisOf>,
    pub(super) reload: Box<Reload>,
    pub(super) observer: Arc<ControlObserver>,
    pub(super) temporary_directory: PathBuf,
    pub(super) patience: Duration,
    pub(super) time_to_look: Duration,
    pub(super) stop: Notify,
    /// The program that takes over, once it has asked.
    successor: std::sync::Mutex<Option<UnixStream>>,
    succession: Notify,
    connections: AtomicU64,
    pub(super) openings: Openings,
}

impl Controller {
    /// Controls a server. `disks` are those of its exports that have bitmaps and checkpoints; other
    /// exports are only listed.
    #[must_use]
    pub fn new(server: ServerHandle, disks: ServedDisks) -> Self {
        Self {
            server,
            disks: Mutex::new(disks),
            open: Arc::new(|_: &RequestedSource| {
                let message = "this server does not open further sources";
                Err(Failure::new(ErrorKind::InvalidRequest, message))
            }),
            open_timeout: std::sync::Mutex::default(),
            uris: Box::new(|_| Vec::new()),
            reload: Box::new(|| {
                let message = "this server has no configuration file; start it with --config";
                Box::pin(async move { Err(Failure::new(ErrorKind::InvalidRequest, message)) })
            }),
            observer: ignore(),
            temporary_directory: PathBuf::from(TEMPORARY_DIRECTORY),
            patience: PATIENCE,
            time_to_look: TIME_TO_LOOK,
            stop: Notify::new(),
            successor: std::sync::Mutex::default(),
            succession: Notify::new(),
            connections: AtomicU64::new(0),
            openings: Openings::default(),
        }
    }

    /// Sets the function that opens the sources that clients ask to export. By default every source
    /// is refused. `open` is called on a thread that may block; the client receives its error.
    #[must_use]
    pub fn open_sources(
        mut self,
        open: impl Fn(&RequestedSource) -> Result<ServedDisk, Failure> + Send + Sync + 'static,
    ) -> Self {
        self.open = Arc::new(open);
        self
    }

    /// Sets the time limit for opening such a source; zero, as by default, for no limit. A request
    /// that takes longer fails, and its thread is left to itself.
    #[must_use]
    pub fn open_timeout(self, limit: Duration) -> Self {
        self.set_open_timeout(limit);
        self
    }

    /// Sets the same time limit for requests from now on.
    pub fn set_open_timeout(&self, limit: Duration) {
        *self.open_timeout.lock().unwrap_or_else(PoisonError::into_inner) = limit;
    }

    pub(super) fn current_open_timeout(&self) -> Duration {
        *self.open_timeout.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the function that returns the URIs of an export by its name; clients receive them for
    /// new exports and views. By default there are none.
    #[must_use]
    pub fn uris(mut self, uris: impl Fn(&str) -> Vec<String> + Send + Sync + 'static) -> Self {
        self.uris = Box::new(uris);
        self
    }

    /// Sets the function that reads the configuration of the server again for clients that request
    /// it. It may add and remove exports. By default there is no configuration.
    #[must_use]
    pub fn reload(mut self, reload: impl Fn() -> Reloading + Send + Sync + 'static) -> Self {
        self.reload = Box::new(reload);
        self
    }

    /// Sets the observer of events. By default they are ignored.
    #[must_use]
    pub fn observer(
        mut self,
        observer: impl Fn(&ControlEvent<'_>) + Send + Sync + 'static,
    ) -> Self {
        self.observer = Arc::new(observer);
        self
    }

    /// Sets the directory of the nameless files that hold data overwritten during checkpoints. By
    /// default it is /var/tmp.
    #[must_use]
    pub fn temporary_directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.temporary_directory = directory.into();
        self
    }

    /// Waits until a client requests the end of the server.
    ///
    /// # Cancel safety
    ///
    /// Safe.
    pub async fn shutdown_requested(&self) {
        self.stop.notified().await;
    }

    /// Waits until another program asks to take over, and returns the connection to it, for
    /// [`takeover::Successor`](crate::takeover::Successor). From the request on no other request is
    /// carried out.
    ///
    /// # Cancel safety
    ///
    /// Safe.
    pub async fn takeover_requested(&self) -> UnixStream {
        loop {
            self.succession.notified().await;
            let successor = self.successor.lock();
            let successor = successor.unwrap_or_else(PoisonError::into_inner).take();
            if let Some(successor) = successor {
                return successor;
            }
        }
    }

    /// Refuses further requests, if the server can be taken over.
    pub(super) async fn suspend(&self) -> Result<(), Failure> {
        let files = {
            let disks = self.disks.lock().await;
            disks.refuse_if_suspended()?;
            disks.check_takeover()?;
            disks.files()
        };
        // A file system may hang, and other requests must not.
        blocking(move || check_names(&files)).await??;
        let deadline = Instant::now() + TIME_TO_CLOSE;
        loop {
            let mut disks = self.disks.lock().await;
            disks.refuse_if_suspended()?;
            disks.check_takeover()?;
            refuse_removed(self.server.exports().removed_in_use())?;
            let refused = disks.refuse_closing().and_then(|()| disks.refuse_working());
            match refused.and_then(|()| self.openings.suspend()) {
                Ok(()) => {
                    disks.is_suspended = true;
                    return Ok(());
                }
                // The last client may have left just now.
                Err(_) if Instant::now() < deadline => {}
                Err(failure) => return Err(failure),
            }
            drop(disks);
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Carries out requests again: the takeover does not come about.
    pub(super) async fn resume(&self) {
        let mut disks = self.disks.lock().await;
        // Under the lock: another program may take over as soon as it is released.
        self.openings.resume();
        disks.is_suspended = false;
    }

    /// Begins to open something that may be exported later. The server is not taken over before
    /// everything that is opened is exported or closed again.
    ///
    /// # Errors
    ///
    /// While another program takes the server over.
    pub fn begin_opening(&self) -> Result<OpeningGuard, Failure> {
        self.openings.begin()
    }

    pub(super) fn hand_over_to(&self, successor: UnixStream) {
        let slot = self.successor.lock();
        *slot.unwrap_or_else(PoisonError::into_inner) = Some(successor);
        self.succession.notify_one();
    }

    /// Takes the disks of a server that was paused, to close them or to go on with another
    /// controller.
    ///
    /// # Cancel safety
    ///
    /// Safe: a dropped future has taken nothing.
    pub async fn take_disks(&self) -> ServedDisks {
        let mut disks = self.disks.lock().await;
        let taken = disks.take();
        disks.is_suspended = true;
        taken
    }

    /// Ends every stream, and every checkpoint as failed: ranges without a backup stay dirty. To be
    /// called when the server has ended. A checkpoint that cannot be ended is reported as
    /// [`ControlEvent::CheckpointNotEnded`].
    ///
    /// # Cancel safety
    ///
    /// Safe: it can be called again for the checkpoints that are left.
    pub async fn end_checkpoints(&self) {
        self.end_streams().await;
        self.abandon_checkpoints(None).await;
    }

    /// Ends all streams, and waits for that, but not for a read that hangs.
    async fn end_streams(&self) {
        let disks = self.disks.lock().await;
        let all = disks.disks.values().filter_map(|disk| disk.streaming.as_ref());
        let all: Vec<_> = all.map(|streaming| streaming.cancel("the server ends")).collect();
        drop(disks);
        let deadline = Instant::now() + TIME_TO_STOP;
        for streaming in all {
            streaming.ended(deadline).await;
        }
    }

    /// Registers a new client of the control socket.
    pub(super) fn new_connection(&self) -> ConnectionId {
        ConnectionId(self.connections.fetch_add(1, Ordering::Relaxed))
    }

    /// Unregisters a client: the checkpoints bound to its connection are ended as failed.
    pub(super) async fn end_connection(&self, id: ConnectionId) {
        self.abandon_checkpoints(Some(id)).await;
    }

    pub(super) fn observe(&self, event: &ControlEvent<'_>) {
        (self.observer)(event);
    }

    /// Releases the disks of a server that has ended: each is closed as soon as nothing else holds
    /// it.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not stop the release.
    pub async fn release_disks(&self) {
        let disks = std::mem::take(&mut self.disks.lock().await.disks);
        // Closing an image may block, and one that hangs must not keep the others open.
        let closing: Vec<_> =
            disks.into_values().map(|disk| tasks::spawn_blocking(|| drop(disk))).collect();
        for closed in closing {
            let _ = closed.await;
        }
    }

    /// Waits until no other request is about a disk, for `limit` at most, or without an end if that
    /// is zero. Returns the disks as well, so that the next step can look at this one.
    pub(super) async fn turn(
        &self,
        export: &str,
        limit: Duration,
    ) -> Result<(Turn, MutexGuard<'_, ServedDisks>), Failure> {
        let disks = self.disks.lock().await;
        disks.refuse_if_suspended()?;
        let turn = Arc::clone(&disks.get(export)?.turn);
        drop(disks);
        let Some(turn) = within(limit, turn.lock_owned()).await else {
            return Err(still_working(export));
        };
        let disks = self.disks.lock().await;
        disks.refuse_if_suspended()?;
        // There may be another disk of that name by now.
        if !Arc::ptr_eq(&disks.get(export)?.turn, OwnedMutexGuard::mutex(&turn)) {
            return Err(not_found(export));
        }
        Ok((Arc::new(turn), disks))
    }

    /// Ends all checkpoints, or those that are bound to a connection, as failed: all at a time,
    /// because one may hang.
    async fn abandon_checkpoints(&self, connection: Option<ConnectionId>) {
        let names = self.disks.lock().await.with_checkpoint(connection);
        let abandon = async |export: String| {
            let ended = self.end_checkpoint(&export, Outcome::Failure, connection);
            if let Err(failure) = ended.await
                && failure.kind != ErrorKind::NotFound
            {
                self.observe(&ControlEvent::CheckpointNotEnded {
                    export: &export,
                    failure: &failure,
                });
            }
        };
        tasks::all_at_once(names.into_iter().map(abandon), |()| {}).await;
    }
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller").field("server", &self.server).finish_non_exhaustive()
    }
}

/// Runs work that may block.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    tasks::spawn_blocking(work).await.map_err(|error| {
        Failure::new(ErrorKind::Failed, format!("the request was abandoned: {error}"))
    })
}

pub(super) fn encoded(result: impl Serialize) -> Result<Value, Failure> {
    serde_json::to_value(result).map_err(|error| Failure::new(ErrorKind::Failed, error.to_string()))
}
