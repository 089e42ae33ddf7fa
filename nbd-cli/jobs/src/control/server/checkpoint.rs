//! The start and the end of a checkpoint.

use std::sync::Arc;

use imgfmt::Uuid;
use nbd_server::InUse;
use serde_json::{Value, json};

use super::checkpoint_bitmap::{
    CheckpointTerms, RequestedBase, StartedCheckpoint, begin, settle, start_with_bitmap,
};
use super::controller::{Controller, blocking};
use super::disks::{BitmapOrigin, ConnectionId, RunningCheckpoint, ServedDisks};
use super::event::ControlEvent;
use crate::control::{CheckpointStarted, ErrorKind, Failure, IfMissing, IfUnusable, Outcome};

/// Suffix of the name of a view's export.
const VIEW_SUFFIX: &str = ".checkpoint";

/// A requested checkpoint.
pub(super) struct CheckpointRequest {
    pub(super) bitmap: Option<String>,
    pub(super) if_missing: IfMissing,
    pub(super) if_unusable: IfUnusable,
    pub(super) base: RequestedBase,
    /// Name of the view's export.
    pub(super) view: Option<String>,
    /// The connection with which it ends.
    pub(super) connection: Option<ConnectionId>,
}

impl Controller {
    pub(super) async fn start_checkpoint(
        &self,
        disks: &mut ServedDisks,
        export: &str,
        request: CheckpointRequest,
    ) -> Result<Value, Failure> {
        let disk = disks.get_mut(export)?;
        let (connection, bitmap) = (request.connection, request.bitmap);
        let backup = Uuid::random().map_err(|error| {
            let message = format!("the system gives no random numbers: {error}");
            Failure::new(ErrorKind::Failed, message)
        })?;
        let view_name = request.view.unwrap_or_else(|| format!("{export}{VIEW_SUFFIX}"));
        if self.server.exports().entries().iter().any(|(taken, _)| *taken == view_name) {
            let message = format!("there is an export named '{view_name}' already");
            return Err(Failure::new(ErrorKind::AlreadyExists, message));
        }
        let image = bitmap.as_ref().map(|_| disk.image()).transpose()?;
        let checkpointed = disk.export.clone();
        let terms = CheckpointTerms {
            if_missing: request.if_missing,
            if_unusable: request.if_unusable,
            base: request.base,
            backup,
            temporary_directory: self.temporary_directory.clone(),
            observer: self.observer.clone(),
        };
        let started = blocking(move || match (image, bitmap) {
            (Some(image), Some(name)) => start_with_bitmap(&checkpointed, &image, name, &terms),
            _ => Ok(StartedCheckpoint::without_bitmap(begin(&checkpointed, &terms, || Ok(()))?)),
        });
        let StartedCheckpoint { view, bitmap, restart_reason } = started.await??;
        let had_bits = bitmap.as_ref().filter(|bitmap| bitmap.origin != BitmapOrigin::Added);
        let reply = CheckpointStarted {
            view: view_name.clone(),
            bitmap: had_bits.map(|bitmap| bitmap.name.clone()),
            restart_reason,
            backup: Some(backup.to_string()),
            disk: disk.id(),
            uris: (self.uris)(&view_name),
        };
        disk.checkpoint = Some(RunningCheckpoint { view: view_name.clone(), bitmap, connection });
        // Clients that may not use the disk may not use its view either.
        let entry = self.server.exports().find(export).map(|(_, entry)| entry);
        let entry = entry.unwrap_or_else(|| disk.entry()).with_export(Arc::new(view));
        let entry = entry.description(format!("'{export}' at one moment"));
        if let Err(error) = self.server.exports().add(view_name, entry) {
            self.abandon_checkpoint(disks, export).await?;
            return Err(Failure::new(ErrorKind::InvalidRequest, error.to_string()));
        }
        self.observe(&ControlEvent::CheckpointStarted { export, view: &reply.view });
        serde_json::to_value(reply)
            .map_err(|error| Failure::new(ErrorKind::Failed, error.to_string()))
    }

    pub(super) async fn end_checkpoint(
        &self,
        disks: &mut ServedDisks,
        export: &str,
        outcome: Outcome,
    ) -> Result<Value, Failure> {
        let disk = disks.get_mut(export)?;
        let checkpoint = disk.checkpoint.clone().ok_or_else(|| {
            let message = format!("no checkpoint of '{export}' is in progress");
            Failure::new(ErrorKind::NotFound, message)
        })?;
        if outcome == Outcome::Success
            && let Some(why) = disk.export.failure().flatten()
        {
            let message = format!(
                "the view of '{export}' was lost ({why}), so the data read from it is not a \
                 backup; end the checkpoint with failure"
            );
            return Err(Failure::new(ErrorKind::Failed, message));
        }
        // It may never have been registered.
        let _ = self.server.remove_export(&checkpoint.view, InUse::Disconnect).await;
        let (checkpointed, image) = (disk.export.clone(), disk.image.clone());
        let observer = self.observer.clone();
        blocking(move || {
            checkpointed.end();
            match (checkpoint.bitmap, image) {
                (Some(bitmap), Some(image)) => settle(&image, &bitmap, outcome, &*observer),
                _ => Ok(()),
            }
        })
        .await??;
        disk.checkpoint = None;
        self.observe(&ControlEvent::CheckpointEnded { export, outcome });
        Ok(json!({}))
    }

    pub(super) async fn abandon_checkpoint(
        &self,
        disks: &mut ServedDisks,
        export: &str,
    ) -> Result<Value, Failure> {
        self.end_checkpoint(disks, export, Outcome::Failure).await
    }
}
