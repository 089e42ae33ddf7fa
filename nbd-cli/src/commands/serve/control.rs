//! `serve --control`: the server's side of the control socket.

mod bitmaps;
mod checkpoint;
mod controller;
mod places;
mod socket;

use std::time::SystemTime;

use imgfmt::Locking;
use nbd_proto::wire::TransmissionFlags;
use nbd_server::{InUse, RemoveError};
use serde_json::{Value, json};

use self::checkpoint::{CheckpointRequest, RequestedBase};
pub(super) use self::controller::Controller;
use self::controller::blocking;
pub(super) use self::socket::ControlSocket;
use super::disks::{ConversationId, Disk, Disks, RunningCheckpoint};
use super::source;
use crate::serving::image::{ImageChoices, Writes};
use nbd_jobs::control::{
    ClientState, ErrorKind, ExportState, Failure, Lifetime, Listing, OnUse, Request,
};

impl Controller {
    /// Unregisters a client: the checkpoints bound to its connection are ended as failed.
    async fn end_conversation(&self, id: ConversationId) {
        self.abandon_checkpoints(|checkpoint| checkpoint.conversation == Some(id)).await;
    }

    /// Waits until a client requests the end of the server.
    pub(super) async fn stopped(&self) {
        self.stop.notified().await;
    }

    /// Ends every checkpoint as failed: ranges without a backup stay dirty.
    pub(super) async fn end_all(&self) {
        self.abandon_checkpoints(|_| true).await;
    }

    async fn abandon_checkpoints(&self, which: impl Fn(&RunningCheckpoint) -> bool) {
        let mut disks = self.disks.lock().await;
        let names: Vec<_> = disks.names();
        for name in names {
            if disks.get(&name).is_ok_and(|disk| disk.checkpoint.as_ref().is_some_and(&which))
                && let Err(failure) = self.abandon_checkpoint(&mut disks, &name).await
            {
                tracing::error!(export = %name, why = %failure.message, "checkpoint not ended");
            }
        }
    }

    /// Executes a request.
    async fn carry_out(
        &self,
        request: Request,
        conversation: ConversationId,
    ) -> Result<Value, Failure> {
        let mut disks = self.disks.lock().await;
        match request {
            Request::List {} => {
                let listing = self.list(&disks).await?;
                serde_json::to_value(listing)
                    .map_err(|error| Failure::new(ErrorKind::Failed, error.to_string()))
            }
            Request::AddExport { name, source, read_only, format, description } => {
                let choices = self.choices_for(read_only, format.as_deref())?;
                self.add(&mut disks, name, source, choices, description).await
            }
            Request::RemoveExport { name, on_use } => self.remove(&mut disks, &name, on_use).await,
            Request::CheckpointStart {
                export,
                bitmap,
                if_missing,
                if_unusable,
                view,
                base,
                trust_base,
                lifetime,
            } => {
                let conversation = match lifetime {
                    Lifetime::Server => None,
                    Lifetime::Connection => Some(conversation),
                };
                let base = RequestedBase::new(base.as_deref(), trust_base)?;
                let request =
                    CheckpointRequest { bitmap, if_missing, if_unusable, view, base, conversation };
                self.start_checkpoint(&mut disks, &export, request).await
            }
            Request::CheckpointEnd { export, outcome } => {
                self.end_checkpoint(&mut disks, &export, outcome).await
            }
            Request::Shutdown {} => {
                self.stop.notify_one();
                Ok(json!({}))
            }
            request => bitmaps::change(&disks, request).await,
        }
    }

    fn choices_for(&self, read_only: bool, format: Option<&str>) -> Result<ImageChoices, Failure> {
        let mut choices = self.choices.clone();
        choices.snapshot = None;
        choices.writes = if read_only { Writes::Refused } else { Writes::ToImage };
        if !read_only && choices.locking == Locking::Shared {
            choices.locking = Locking::Auto;
        }
        choices.format = match format {
            None => None,
            Some(name) => Some(imgfmt::Format::from_name(name).ok_or_else(|| {
                let message = format!("there is no format '{name}'; use raw or qcow2");
                Failure::new(ErrorKind::InvalidRequest, message)
            })?),
        };
        Ok(choices)
    }

    async fn list(&self, disks: &Disks) -> Result<Listing, Failure> {
        let clients = self.server.clients();
        let mut exports = Vec::new();
        for (name, entry) in self.server.exports().entries() {
            let info = entry.export().info();
            let disk = disks.get(&name).ok();
            let bitmaps = match disk {
                Some(disk) => bitmaps::list(disk).await?,
                None => Vec::new(),
            };
            exports.push(ExportState {
                size: info.size,
                read_only: info.flags.contains(TransmissionFlags::READ_ONLY),
                clients: self.server.users_of(&entry),
                source: disk.map(|disk| disk.source.clone()),
                bitmaps,
                disk: disk.and_then(Disk::id),
                checkpoint: disk.and_then(Disk::describe_checkpoint),
                name,
            });
        }
        let clients = clients.into_iter().map(|client| ClientState {
            id: client.id,
            peer: client.peer,
            export: client.export,
            since: seconds(client.since),
        });
        Ok(Listing { exports, clients: clients.collect() })
    }

    async fn add(
        &self,
        disks: &mut Disks,
        name: String,
        source: String,
        choices: ImageChoices,
        description: Option<String>,
    ) -> Result<Value, Failure> {
        if self.server.exports().entries().iter().any(|(taken, _)| *taken == name) {
            let message = format!("there is an export named '{name}' already");
            return Err(Failure::new(ErrorKind::AlreadyExists, message));
        }
        let from = source.clone();
        let opened = blocking(move || {
            source::open(from.as_ref(), &choices)
                .map_err(|error| Failure::new(ErrorKind::Failed, error.to_string()))
        })
        .await??;
        let disk = Disk::new(source, opened);
        let mut entry = disk.entry();
        if let Some(text) = description {
            entry = entry.description(text);
        }
        self.server
            .exports()
            .add(name.clone(), entry)
            .map_err(|error| Failure::new(ErrorKind::InvalidRequest, error.to_string()))?;
        let uris = (self.uris)(&name);
        disks.insert(name.clone(), disk);
        tracing::info!(export = %name, "export added");
        Ok(json!({ "uris": uris }))
    }

    async fn remove(&self, disks: &mut Disks, name: &str, on_use: OnUse) -> Result<Value, Failure> {
        if disks.get(name)?.checkpoint.is_some() {
            let message = format!("a checkpoint of '{name}' is in progress; end it first");
            return Err(Failure::new(ErrorKind::InUse, message));
        }
        let in_use = match on_use {
            OnUse::Refuse => InUse::Refuse,
            OnUse::Disconnect => InUse::Disconnect,
        };
        let entry = self.server.remove_export(name, in_use).await.map_err(|error| {
            let kind = match error {
                RemoveError::InUse { .. } => ErrorKind::InUse,
                _ => ErrorKind::NotFound,
            };
            Failure::new(kind, error.to_string())
        })?;
        let disk = disks.remove(name);
        tracing::info!(export = %name, "export removed");
        blocking(move || {
            let flushed = entry.export().flush();
            // Closes the image, unless a cancelled request is still working on it.
            drop((entry, disk));
            flushed.map_err(|error| {
                let message = format!("the export is removed, but flushing it failed: {error}");
                Failure::new(ErrorKind::Failed, message)
            })
        })
        .await??;
        Ok(json!({}))
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
