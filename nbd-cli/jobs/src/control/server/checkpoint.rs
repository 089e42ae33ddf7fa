//! The start and the end of a checkpoint.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use imgfmt::Uuid;
use nbd_server::InUse;
use serde_json::Value;

use super::checkpoint_bitmap::{CheckpointTerms, RequestedBase, StartedCheckpoint, settle};
use super::controller::{Controller, blocking, encoded};
use super::disks::{BitmapOrigin, ConnectionId, RunningCheckpoint, ServedDisks, Turn};
use super::event::ControlEvent;
use super::together::{Prepared, start_all};
use crate::control::{
    CheckpointStarted, ErrorKind, Failure, IfMissing, IfUnusable, Lifetime, Outcome, Request,
    TogetherCheckpoint,
};

/// Suffix of the name of a view's export.
const VIEW_SUFFIX: &str = ".checkpoint";

/// Most checkpoints that are started at one moment: each has a thread meanwhile.
const TOGETHER_MAX: usize = 128;

/// A requested checkpoint.
struct CheckpointRequest {
    bitmap: Option<String>,
    if_missing: IfMissing,
    if_unusable: IfUnusable,
    base: RequestedBase,
    /// Name of the view's export.
    view: Option<String>,
    /// The connection with which it ends.
    connection: Option<ConnectionId>,
}

/// Returns the checkpoints that a request wants, and their exports.
fn requested(
    request: Request,
    connection: ConnectionId,
) -> Result<Vec<(String, CheckpointRequest)>, Failure> {
    let until = |lifetime| match lifetime {
        Lifetime::Server => None,
        Lifetime::Connection => Some(connection),
    };
    match request {
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
            let base = RequestedBase::new(base.as_deref(), trust_base)?;
            let connection = until(lifetime);
            let one = CheckpointRequest { bitmap, if_missing, if_unusable, base, view, connection };
            Ok(vec![(export, one)])
        }
        Request::CheckpointStartTogether { checkpoints, .. }
            if checkpoints.len() > TOGETHER_MAX =>
        {
            let message = format!("at most {TOGETHER_MAX} checkpoints are started at once");
            Err(Failure::new(ErrorKind::InvalidRequest, message))
        }
        Request::CheckpointStartTogether { checkpoints, lifetime } => {
            let connection = until(lifetime);
            let one = |one: TogetherCheckpoint| {
                let TogetherCheckpoint { export, bitmap, if_missing, if_unusable, base } = one;
                let (base, view) = (RequestedBase::new(base.as_deref(), false)?, None);
                let one =
                    CheckpointRequest { bitmap, if_missing, if_unusable, base, view, connection };
                Ok((export, one))
            };
            checkpoints.into_iter().map(one).collect()
        }
        _ => {
            let message = "this request is for no checkpoint";
            Err(Failure::new(ErrorKind::InvalidRequest, message))
        }
    }
}

impl Controller {
    /// Starts the checkpoint of a request, or several.
    pub(super) async fn start_requested(
        &self,
        request: Request,
        connection: ConnectionId,
    ) -> Result<Value, Failure> {
        let is_one = matches!(request, Request::CheckpointStart { .. });
        let started = self.start_checkpoints(requested(request, connection)?).await?;
        if is_one { encoded(started.first()) } else { encoded(started) }
    }

    /// Starts checkpoints at one moment: all or none.
    async fn start_checkpoints(
        &self,
        requests: Vec<(String, CheckpointRequest)>,
    ) -> Result<Vec<CheckpointStarted>, Failure> {
        let mut turns = self.turns(requests.iter().map(|(export, _)| export.clone())).await?;
        let disks = self.disks.lock().await;
        let mut prepared = Vec::new();
        for (export, request) in requests {
            if let Some(turn) = turns.remove(&export) {
                prepared.push(Arc::new(self.prepare(&disks, export, request, turn)?));
            }
        }
        drop(disks);
        let patience = self.patience;
        let (prepared, started) = blocking(move || {
            let started = start_all(&prepared, patience);
            (prepared, started)
        })
        .await?;
        let started = started?;
        let mut replies = Vec::with_capacity(prepared.len());
        let mut failure = None;
        let mut disks = self.disks.lock().await;
        for (one, started) in prepared.iter().zip(started) {
            match self.show_view(&mut disks, one, started) {
                Ok(reply) => replies.push(reply),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        drop(disks);
        let Some(failure) = failure else { return Ok(replies) };
        for one in prepared {
            let export = one.terms.export.clone();
            // The next request needs the turn.
            drop(one);
            // One that cannot be ended is the next request's; the others must not wait for it.
            let _ = self.end_checkpoint(&export, Outcome::Failure, None).await;
        }
        Err(failure)
    }

    /// Waits until no other request is about any of these disks.
    async fn turns(
        &self,
        exports: impl Iterator<Item = String>,
    ) -> Result<BTreeMap<String, Turn>, Failure> {
        let mut exports: Vec<_> = exports.collect();
        // In one order, so that no two requests wait for each other.
        exports.sort();
        let deadline = Instant::now() + self.patience;
        let mut turns = BTreeMap::new();
        for export in exports {
            // Its writes would be held back twice.
            if turns.contains_key(&export) {
                let message = format!("two checkpoints of '{export}' cannot be started at once");
                return Err(Failure::new(ErrorKind::InvalidRequest, message));
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            let (turn, _) = self.turn(&export, rest.max(Duration::from_millis(1))).await?;
            turns.insert(export, turn);
        }
        Ok(turns)
    }

    /// Checks what can be known beforehand.
    fn prepare(
        &self,
        disks: &ServedDisks,
        export: String,
        request: CheckpointRequest,
        turn: Turn,
    ) -> Result<Prepared, Failure> {
        let disk = disks.get(&export)?;
        let backup = Uuid::random().map_err(|error| {
            let message = format!("the system gives no random numbers: {error}");
            Failure::new(ErrorKind::Failed, message)
        })?;
        let view = request.view.unwrap_or_else(|| format!("{export}{VIEW_SUFFIX}"));
        if self.server.exports().entries().iter().any(|(taken, _)| *taken == view) {
            let message = format!("there is an export named '{view}' already");
            return Err(Failure::new(ErrorKind::AlreadyExists, message));
        }
        let bitmap = match request.bitmap {
            Some(name) => Some((disk.image()?, name)),
            None => None,
        };
        let terms = CheckpointTerms {
            export,
            patience: self.patience,
            if_missing: request.if_missing,
            if_unusable: request.if_unusable,
            base: request.base,
            backup,
            temporary_directory: self.temporary_directory.clone(),
            observer: self.observer.clone(),
        };
        let (disk, connection) = (disk.export.clone(), request.connection);
        Ok(Prepared { disk, bitmap, terms, view, connection, _turn: turn })
    }

    /// Exports the view of a checkpoint that was started.
    fn show_view(
        &self,
        disks: &mut ServedDisks,
        prepared: &Prepared,
        started: StartedCheckpoint,
    ) -> Result<CheckpointStarted, Failure> {
        let (terms, view_name) = (&prepared.terms, prepared.view.clone());
        let (export, connection) = (&*terms.export, prepared.connection);
        let disk = disks.get_mut(export)?;
        let StartedCheckpoint { view, bitmap, restart_reason } = started;
        let had_bits = bitmap.as_ref().filter(|bitmap| bitmap.origin != BitmapOrigin::Added);
        let reply = CheckpointStarted {
            view: view_name.clone(),
            bitmap: had_bits.map(|bitmap| bitmap.name.clone()),
            restart_reason,
            backup: Some(terms.backup.to_string()),
            disk: disk.id(),
            uris: (self.uris)(&view_name),
        };
        disk.checkpoint = Some(RunningCheckpoint { view: view_name.clone(), bitmap, connection });
        // Clients that may not use the disk may not use its view either.
        let entry = self.server.exports().find(export).map(|(_, entry)| entry);
        let entry = entry.unwrap_or_else(|| disk.entry()).with_export(Arc::new(view));
        let entry = entry.description(format!("'{export}' at one moment"));
        let added = self.server.exports().add(view_name, entry);
        added.map_err(|error| Failure::new(ErrorKind::InvalidRequest, error.to_string()))?;
        self.observe(&ControlEvent::CheckpointStarted { export, view: &reply.view });
        Ok(reply)
    }

    /// Ends a checkpoint; if a connection is given, only one that is bound to it, and however long
    /// earlier requests take.
    pub(super) async fn end_checkpoint(
        &self,
        export: &str,
        outcome: Outcome,
        connection: Option<ConnectionId>,
    ) -> Result<(), Failure> {
        let limit = if connection.is_some() { Duration::ZERO } else { self.patience };
        let (turn, disks) = self.turn(export, limit).await?;
        let disk = disks.get(export)?;
        let checkpoint = disk.checkpoint.clone();
        let checkpoint =
            checkpoint.filter(|it| connection.is_none() || it.connection == connection);
        let checkpoint = checkpoint.ok_or_else(|| {
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
        let (checkpointed, image) = (disk.export.clone(), disk.image.clone());
        drop(disks);
        // It may never have been registered.
        let _ = self.server.remove_export(&checkpoint.view, InUse::Disconnect).await;
        let observer = self.observer.clone();
        let own = turn.clone();
        blocking(move || {
            let _turn = own;
            checkpointed.end();
            match (checkpoint.bitmap, image) {
                (Some(bitmap), Some(image)) => settle(&image, &bitmap, outcome, &*observer),
                _ => Ok(()),
            }
        })
        .await??;
        if let Ok(disk) = self.disks.lock().await.get_mut(export) {
            disk.checkpoint = None;
        }
        drop(turn);
        self.observe(&ControlEvent::CheckpointEnded { export, outcome });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_checkpoints_at_one_moment_than_there_may_be_threads_for_are_refused() {
        let wanted = |count: usize| {
            let one = |number| TogetherCheckpoint {
                export: format!("export{number}"),
                bitmap: None,
                if_missing: IfMissing::default(),
                if_unusable: IfUnusable::default(),
                base: None,
            };
            let checkpoints = (0..count).map(one).collect();
            let lifetime = Lifetime::Connection;
            requested(Request::CheckpointStartTogether { checkpoints, lifetime }, ConnectionId(7))
        };
        let all = wanted(TOGETHER_MAX).unwrap();
        assert!(all.len() == TOGETHER_MAX && all[3].0 == "export3");
        assert!(all.iter().all(|(_, one)| one.connection == Some(ConnectionId(7))));
        let refused = wanted(TOGETHER_MAX + 1).err().unwrap();
        assert_eq!(refused.kind, ErrorKind::InvalidRequest);
    }
}
