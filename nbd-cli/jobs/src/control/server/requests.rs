//! Requests about exports, and the distribution of all requests.

use imgfmt::Format;
use nbd_server::export::ExportEntry;
use nbd_server::{InUse, RemoveError};
use serde_json::{Value, json};

use super::bitmaps;
use super::controller::{Controller, RequestedSource, blocking, encoded};
use super::disks::{ConnectionId, ServedDisk, ServedDisks, still_working};
use super::event::ControlEvent;
use super::openings::OpeningGuard;
use super::streaming::StreamRequest;
use crate::control::{ErrorKind, Failure, OnUse, Request, StreamAction};
use crate::opening::{open_within, within};
use crate::status::Status;
use crate::text::printable;

impl Controller {
    /// Executes a request.
    pub(super) async fn execute(
        &self,
        request: Request,
        connection: ConnectionId,
    ) -> Result<Value, Failure> {
        if matches!(request, Request::Reload {}) {
            // It adds and removes exports itself, and waits for no other request before that.
            let _opening = self.begin_opening()?;
            return (self.reload)().await;
        }
        if matches!(request, Request::Statistics {}) {
            // It waits for no other request.
            return encoded(Status::of(&self.server));
        }
        if matches!(request, Request::Shutdown {}) {
            return self.shut_down().await;
        }
        if let Request::AddExport { name, source, read_only, format, description } = request {
            let format = format.as_deref().map(known_format).transpose()?;
            let source = RequestedSource { name, source, read_only, format };
            return self.open_and_add(source, description).await;
        }
        match request {
            Request::List {} => encoded(self.list().await?),
            Request::RemoveExport { name, on_use } => {
                self.remove_export(&name, on_use).await.map(|()| json!({}))
            }
            request @ (Request::CheckpointStart { .. }
            | Request::CheckpointStartTogether { .. }) => {
                self.start_requested(request, connection).await
            }
            Request::CheckpointEnd { export, outcome } => {
                self.end_checkpoint(&export, outcome, None).await.map(|()| json!({}))
            }
            Request::Stream { export, base, rate, action } => encoded(match action {
                StreamAction::Start => {
                    self.start_stream(&export, StreamRequest { base, rate }).await?
                }
                StreamAction::Cancel => self.cancel_stream(&export).await?,
            }),
            Request::Takeover {} => {
                let message = "a takeover comes from a program that takes over";
                Err(Failure::new(ErrorKind::InvalidRequest, message))
            }
            request => bitmaps::change(self, request).await,
        }
    }

    /// Ends the server, unless another program takes it over.
    async fn shut_down(&self) -> Result<Value, Failure> {
        self.disks.lock().await.refuse_if_suspended()?;
        self.stop.notify_one();
        Ok(json!({}))
    }

    /// Exports a disk. Returns the URIs of the export.
    ///
    /// # Errors
    ///
    /// If there is an export of that name, the name is too long, or another program takes the
    /// server over. The disk is closed then.
    ///
    /// # Cancel safety
    ///
    /// Safe: the disk is exported or closed.
    pub async fn add_export(
        &self,
        name: impl Into<String>,
        disk: ServedDisk,
    ) -> Result<Vec<String>, Failure> {
        match self.begin_opening() {
            Ok(opening) => self.add_opened(name, opening, disk).await,
            Err(refused) => {
                // The last one to drop an image closes it, which may block.
                let _ = blocking(move || drop(disk)).await;
                Err(refused)
            }
        }
    }

    /// As [`add_export`](Self::add_export), for a disk that was opened since [`opening`] began.
    ///
    /// [`opening`]: Self::begin_opening
    ///
    /// # Errors
    ///
    /// As [`add_export`](Self::add_export).
    ///
    /// # Cancel safety
    ///
    /// Safe: the disk is exported or closed.
    pub async fn add_opened(
        &self,
        name: impl Into<String>,
        // Before the disk: parameters are dropped in reverse order.
        opening: OpeningGuard,
        disk: ServedDisk,
    ) -> Result<Vec<String>, Failure> {
        let name = name.into();
        let mut disks = self.disks.lock().await;
        let refused =
            disks.refuse_if_suspended().and_then(|()| self.register(&name, &disks, &disk));
        if let Err(refused) = refused {
            disks.note_closing(&name, &disk);
            // The last one to drop an image closes it, which may hang, and other requests must not.
            drop(disks);
            let _ = blocking(move || drop(disk)).await;
            return Err(refused);
        }
        let uris = (self.uris)(&name);
        self.observe(&ControlEvent::ExportAdded { export: &name });
        disks.insert(name, disk);
        drop(opening);
        Ok(uris)
    }

    /// Removes an export and closes its disk.
    ///
    /// # Errors
    ///
    /// If there is no export of that name, it is in use by clients that are not to be disconnected,
    /// or a checkpoint of it is in progress; the export is kept then. If flushing the disk fails,
    /// the export is removed nevertheless.
    ///
    /// # Cancel safety
    ///
    /// Not safe: the export may be removed while its disk remains open.
    pub async fn remove_export(&self, name: &str, on_use: OnUse) -> Result<(), Failure> {
        let (turn, disks) = self.turn(name, self.patience).await?;
        refuse_busy(&disks, name)?;
        drop(disks);
        let in_use = match on_use {
            OnUse::Refuse => InUse::Refuse,
            OnUse::Disconnect => InUse::Disconnect,
        };
        let entry = self.server.remove_export(name, in_use).await.map_err(|error| {
            let message = error.to_string();
            match error {
                RemoveError::InUse { .. } => {
                    let advice = "add --disconnect (\"on-use\":\"disconnect\") to end connections";
                    Failure::new(ErrorKind::InUse, format!("{message}; {advice}"))
                }
                _ => Failure::new(ErrorKind::NotFound, message),
            }
        })?;
        let disk = self.disks.lock().await.remove(name);
        drop(turn);
        self.observe(&ControlEvent::ExportRemoved { export: name });
        let limit = self.current_open_timeout();
        let Some(closed) = within(limit, blocking(move || close(Some(entry), disk))).await else {
            let message = format!(
                "the export is removed, but after {} s it is neither flushed nor closed: what it \
                 is on hangs; that goes on in the background",
                limit.as_secs_f64()
            );
            return Err(Failure::new(ErrorKind::Failed, message));
        };
        closed?
    }

    /// Removes an export for new clients; those that use it keep it until they leave, and its disk
    /// is closed then.
    ///
    /// # Errors
    ///
    /// If there is no export of that name, or a checkpoint of it is in progress; it is kept then.
    /// If flushing the disk fails, the export is removed nevertheless.
    ///
    /// # Cancel safety
    ///
    /// Safe: the disk is closed in the background.
    pub async fn release_export(&self, name: &str) -> Result<(), Failure> {
        let (_turn, mut disks) = self.turn(name, self.patience).await?;
        refuse_busy(&disks, name)?;
        let entry = self.server.exports().remove(name);
        let disk = disks.remove(name);
        self.observe(&ControlEvent::ExportRemoved { export: name });
        // Its flush may hang, and other requests must not.
        drop(disks);
        blocking(move || close(entry, disk)).await?
    }

    /// Opens a source and exports it. Other requests are carried out meanwhile: it may hang.
    async fn open_and_add(
        &self,
        source: RequestedSource,
        description: Option<String>,
    ) -> Result<Value, Failure> {
        let opening = self.begin_opening()?;
        self.refuse_taken(&source.name)?;
        let name = source.name.clone();
        let open = self.open.clone();
        let step = format!("opening the source '{}'", printable(&source.source));
        // If it is waited for no longer, the disk is closed before the guard is dropped.
        let limit = self.current_open_timeout();
        let opened = open_within(limit, step, move |_| (open(&source), opening));
        let (opened, opening) =
            opened.await.map_err(|error| Failure::new(ErrorKind::Failed, error.to_string()))?;
        let mut disk = opened?;
        if let Some(text) = description {
            disk = disk.configured(|entry| entry.description(text));
        }
        let uris = self.add_opened(name, opening, disk).await?;
        Ok(json!({ "uris": uris }))
    }

    fn refuse_taken(&self, name: &str) -> Result<(), Failure> {
        if self.server.exports().entries().iter().any(|(taken, _)| taken == name) {
            let message = format!("there is an export named '{name}' already");
            return Err(Failure::new(ErrorKind::AlreadyExists, message));
        }
        Ok(())
    }

    fn register(&self, name: &str, disks: &ServedDisks, disk: &ServedDisk) -> Result<(), Failure> {
        self.refuse_taken(name)?;
        if disks.get(name).is_ok() {
            // It is being removed.
            return Err(still_working(name));
        }
        let added = self.server.exports().add(name, disk.entry());
        added.map_err(|error| Failure::new(ErrorKind::InvalidRequest, error.to_string()))
    }
}

/// Refuses to remove a disk that a checkpoint or a stream uses.
fn refuse_busy(disks: &ServedDisks, name: &str) -> Result<(), Failure> {
    let disk = disks.get(name)?;
    if disk.checkpoint.is_some() {
        let message = format!("a checkpoint of '{name}' is in progress; end it first");
        return Err(Failure::new(ErrorKind::InUse, message));
    }
    disk.refuse_streaming(name)
}

/// Flushes a disk that was removed and closes its image, unless clients or a cancelled request
/// still use it.
fn close(entry: Option<ExportEntry>, disk: Option<ServedDisk>) -> Result<(), Failure> {
    let flushed = entry.as_ref().map_or(Ok(()), |entry| entry.export().flush());
    drop((entry, disk));
    flushed.map_err(|error| {
        let message = format!("the export is removed, but flushing it failed: {error}");
        Failure::new(ErrorKind::Failed, message)
    })
}

fn known_format(name: &str) -> Result<Format, Failure> {
    Format::from_name(name).ok_or_else(|| {
        let message = format!("there is no format '{name}'; use raw or qcow2");
        Failure::new(ErrorKind::InvalidRequest, message)
    })
}
