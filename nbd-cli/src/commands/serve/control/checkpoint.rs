//! The start and the end of a checkpoint.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use imgfmt::{
    BeganAfter, BitmapChange, BitmapInfo, BitmapState, GuestOffset, GuestRange, Recording, Uuid,
};
use nbd_proto::wire::{BlockDescriptor, Errno, MetaContextName};
use nbd_server::InUse;
use nbd_server::export::{
    CheckpointError, Checkpointed, Descriptors, ExportError, ImageExport, PointInTimeView,
};
use rustix::fs::{CWD, Mode, OFlags, openat};
use serde_json::{Value, json};

use super::controller::{Controller, blocking};
use crate::commands::serve::disks::{
    BitmapOrigin, CheckpointBitmap, ConversationId, Disks, RunningCheckpoint,
};
use nbd_jobs::control::{CheckpointStarted, ErrorKind, Failure, IfMissing, IfUnusable, Outcome};

/// Suffix of the name of a view's export.
const VIEW_SUFFIX: &str = ".checkpoint";

/// Set in the status of a dirty range.
const DIRTY: u64 = 1;

/// A requested checkpoint.
pub(super) struct CheckpointRequest {
    pub(super) bitmap: Option<String>,
    pub(super) if_missing: IfMissing,
    pub(super) if_unusable: IfUnusable,
    pub(super) base: RequestedBase,
    /// Name of the view's export.
    pub(super) view: Option<String>,
    /// The connection with which it ends.
    pub(super) conversation: Option<ConversationId>,
}

/// The backup on which the new one builds.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestedBase {
    /// None: a full backup, or an unknown base.
    id: Option<Uuid>,
    /// The user vouches for a base that the image does not record.
    is_trusted: bool,
}

impl RequestedBase {
    pub(super) fn new(id: Option<&str>, is_trusted: bool) -> Result<Self, Failure> {
        let id = id.map(str::parse).transpose().map_err(|error| {
            Failure::new(ErrorKind::InvalidRequest, format!("'base' is not a UUID: {error}"))
        })?;
        Ok(Self { id, is_trusted })
    }

    /// Refuses it unless the bitmap started after it.
    fn check(self, bitmap: &BitmapInfo) -> Result<(), Failure> {
        let Some(base) = self.id else { return Ok(()) };
        let name = &bitmap.name;
        let message = match bitmap.began_after {
            BeganAfter::Backup(id) | BeganAfter::PerhapsBackup(id) if id != base => format!(
                "the bitmap '{name}' started after the backup {id}, not after {base}; use that as the \
                 base, or make a full backup"
            ),
            BeganAfter::Backup(_) => return Ok(()),
            _ if self.is_trusted => return Ok(()),
            BeganAfter::PerhapsBackup(_) => format!(
                "another program has had the image open for writing since the last backup, and may \
                 have cleared the bitmap '{name}'; make a full backup (or add --trust-base, if you know \
                 that it has not)"
            ),
            _ => format!(
                "the image does not record after which backup the bitmap '{name}' started; make a full \
                 backup (or add --trust-base, if you know that it started after this base)"
            ),
        };
        Err(Failure::new(ErrorKind::InvalidRequest, message))
    }
}

impl Controller {
    pub(super) async fn start_checkpoint(
        &self,
        disks: &mut Disks,
        export: &str,
        request: CheckpointRequest,
    ) -> Result<Value, Failure> {
        let disk = disks.get_mut(export)?;
        let (conversation, bitmap) = (request.conversation, request.bitmap);
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
        let terms = Terms {
            if_missing: request.if_missing,
            if_unusable: request.if_unusable,
            base: request.base,
            backup,
        };
        let started = blocking(move || match (image, bitmap) {
            (Some(image), Some(name)) => start_with_bitmap(&checkpointed, &image, name, &terms),
            _ => Ok(StartedCheckpoint::without_bitmap(begin(&checkpointed, || Ok(()))?)),
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
        disk.checkpoint = Some(RunningCheckpoint { view: view_name.clone(), bitmap, conversation });
        // Clients that may not use the disk may not use its view either.
        let entry = self.server.exports().find(export).map(|(_, entry)| entry);
        let entry = entry.unwrap_or_else(|| disk.entry()).with_export(Arc::new(view));
        let entry = entry.description(format!("'{export}' at one moment"));
        if let Err(error) = self.server.exports().add(view_name, entry) {
            self.abandon_checkpoint(disks, export).await?;
            return Err(Failure::new(ErrorKind::InvalidRequest, error.to_string()));
        }
        tracing::info!(%export, view = %reply.view, "checkpoint started");
        serde_json::to_value(reply)
            .map_err(|error| Failure::new(ErrorKind::Failed, error.to_string()))
    }

    pub(super) async fn end_checkpoint(
        &self,
        disks: &mut Disks,
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
        blocking(move || {
            checkpointed.end();
            match (checkpoint.bitmap, image) {
                (Some(bitmap), Some(image)) => settle(&image, &bitmap, outcome),
                _ => Ok(()),
            }
        })
        .await??;
        disk.checkpoint = None;
        tracing::info!(%export, ?outcome, "checkpoint ended");
        Ok(json!({}))
    }

    pub(super) async fn abandon_checkpoint(
        &self,
        disks: &mut Disks,
        export: &str,
    ) -> Result<Value, Failure> {
        self.end_checkpoint(disks, export, Outcome::Failure).await
    }
}

fn begin(
    disk: &Checkpointed,
    at_switch: impl FnOnce() -> imgfmt::Result<()>,
) -> Result<PointInTimeView, Failure> {
    let file = nameless_file().map_err(|error| {
        let message = format!(
            "cannot create a file for overwritten data: {error}; set TMPDIR to a directory with \
             room"
        );
        Failure::new(ErrorKind::Failed, message)
    })?;
    disk.begin(file, at_switch).map_err(|error| match error {
        CheckpointError::AtSwitch(error) => error.into(),
        CheckpointError::InProgress => Failure::new(ErrorKind::InUse, error.to_string()),
        error => Failure::new(ErrorKind::Failed, error.to_string()),
    })
}

/// The treatment of a bitmap at its checkpoint.
struct Terms {
    if_missing: IfMissing,
    if_unusable: IfUnusable,
    base: RequestedBase,
    /// The identity of the new backup.
    backup: Uuid,
}

/// A checkpoint in progress.
struct StartedCheckpoint {
    view: PointInTimeView,
    bitmap: Option<CheckpointBitmap>,
    /// The reason why the bitmap was unreliable, if it was restarted for that reason.
    restart_reason: Option<String>,
}

impl StartedCheckpoint {
    fn without_bitmap(view: PointInTimeView) -> Self {
        Self { view, bitmap: None, restart_reason: None }
    }
}

fn start_with_bitmap(
    disk: &Checkpointed,
    image: &Arc<ImageExport>,
    name: String,
    terms: &Terms,
) -> Result<StartedCheckpoint, Failure> {
    let known = image.image().bitmaps();
    let Some(found) = known.iter().find(|bitmap| bitmap.name == name) else {
        if terms.if_missing == IfMissing::Fail {
            let message = format!("the image has no bitmap '{name}'");
            return Err(Failure::new(ErrorKind::NotFound, message));
        }
        let changes = added_dirty(&name, terms.backup);
        let view = begin(disk, || image.image().bitmap_transaction(&changes))?;
        let bitmap = Some(CheckpointBitmap { name, origin: BitmapOrigin::Added });
        return Ok(StartedCheckpoint { view, bitmap, restart_reason: None });
    };
    if found.recording == Recording::Disabled {
        let message = format!(
            "the bitmap '{name}' is disabled and has not recorded every change; enable it and make a \
             full backup"
        );
        return Err(Failure::new(ErrorKind::InvalidRequest, message));
    }
    terms.base.check(found)?;
    let context = MetaContextName::qemu_dirty_bitmap(&name)
        .map_err(|error| Failure::new(ErrorKind::InvalidRequest, error.to_string()))?;
    let problem = found.state.problem();
    let mut changes = match (&problem, terms.if_unusable) {
        (Some(_), IfUnusable::Restart) => made_usable(&known, found),
        _ => Vec::new(),
    };
    changes.push(BitmapChange::Freeze { name: name.clone(), backup: Some(terms.backup) });
    // Clients of the disk itself would miss the frozen bits.
    let origin = match image.withdraw_bitmap(&name) {
        true => BitmapOrigin::Offered,
        false => BitmapOrigin::NotOffered,
    };
    let bitmap = CheckpointBitmap { name, origin };
    let started = begin(disk, || image.image().bitmap_transaction(&changes));
    let view = started.inspect_err(|_| offer_again(image, &bitmap))?;
    let (image, frozen) = (Arc::clone(image), bitmap.frozen());
    let status =
        move |offset, length, max_count| dirty_status(&image, &frozen, offset, length, max_count);
    let view = view.with_context(context, Box::new(status));
    let restart_reason = problem.filter(|_| terms.if_unusable == IfUnusable::Restart);
    Ok(StartedCheckpoint { view, bitmap: Some(bitmap), restart_reason })
}

/// Adds a bitmap that starts at the checkpoint. If that is cut off, everything before counts as
/// dirty, because the changes are unknown.
fn added_dirty(name: &str, backup: Uuid) -> Vec<BitmapChange> {
    let (name, recording) = (name.to_owned(), Recording::Enabled);
    let granularity = imgfmt::BITMAP_GRANULARITY_DEFAULT;
    vec![
        BitmapChange::Add { name: name.clone(), granularity, recording },
        BitmapChange::MarkAll { name: name.clone() },
        BitmapChange::Freeze { name, backup: Some(backup) },
    ]
}

/// Marks everything dirty in an unreliable bitmap.
fn made_usable(all: &[BitmapInfo], bitmap: &BitmapInfo) -> Vec<BitmapChange> {
    let is_unsound = |bitmap: &BitmapInfo| {
        matches!(bitmap.state, BitmapState::Inconsistent { .. } | BitmapState::Damaged { .. })
    };
    let frozen = imgfmt::frozen_bitmap_name(&bitmap.name);
    let concerned = all.iter().filter(|it| it.name == bitmap.name || it.name == frozen);
    let unsound = concerned.filter(|it| is_unsound(it));
    unsound.map(|it| BitmapChange::Repair { name: it.name.clone() }).collect()
}

/// Restores the bitmap that the disk's export offered before the checkpoint, or offers a new one.
fn offer_again(image: &ImageExport, bitmap: &CheckpointBitmap) {
    let is_possible = MetaContextName::qemu_dirty_bitmap(&bitmap.name).is_ok();
    if bitmap.origin != BitmapOrigin::NotOffered
        && is_possible
        && let Err(error) = image.offer_bitmap(&bitmap.name)
    {
        tracing::error!(bitmap = %bitmap.name, %error, "bitmap not offered");
    }
}

/// Drops frozen bits, or merges them back.
fn settle(image: &ImageExport, bitmap: &CheckpointBitmap, outcome: Outcome) -> Result<(), Failure> {
    let name = bitmap.name.clone();
    let changes = match (bitmap.origin, outcome) {
        (_, Outcome::Success) => vec![BitmapChange::DropFrozen { name }],
        // Nothing was recorded before the checkpoint, so no backup can build on the changes
        // recorded since.
        (BitmapOrigin::Added, Outcome::Failure) => {
            let names = [name, bitmap.frozen()];
            names.into_iter().map(|name| BitmapChange::Remove { name }).collect()
        }
        (_, Outcome::Failure) => vec![BitmapChange::Thaw { name }],
    };
    image.image().bitmap_transaction(&changes)?;
    if outcome == Outcome::Success || bitmap.origin != BitmapOrigin::Added {
        offer_again(image, bitmap);
    }
    Ok(())
}

/// Returns a frozen bitmap as block status.
fn dirty_status(
    image: &ImageExport,
    bitmap: &str,
    offset: u64,
    length: u64,
    max_count: usize,
) -> Result<Vec<BlockDescriptor>, ExportError> {
    let outside = || ExportError::new(Errno::EINVAL, "the range is outside the image");
    let range = GuestRange::new(GuestOffset::new(offset), length).ok_or_else(outside)?;
    let found = image.image().dirty_extents(bitmap, range, max_count).map_err(|error| {
        tracing::error!(%error, "cannot look at a frozen bitmap");
        ExportError::new(Errno::EIO, "the bitmap cannot be read")
    })?;
    let mut status = Descriptors::new(max_count);
    for extent in found {
        if !status.push(extent.range.length(), if extent.is_dirty { DIRTY } else { 0 }) {
            break;
        }
    }
    Ok(status.into_vec())
}

/// Creates a file without a name, in TMPDIR or else in /var/tmp.
fn nameless_file() -> io::Result<File> {
    let directory = std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match openat(CWD, &directory, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        // Not every file system supports that.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
            let path = directory.join(format!("nbd-cli-{}.checkpoint", std::process::id()));
            let file = File::options().read(true).write(true).create_new(true).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        }
        Err(error) => Err(error.into()),
    }
}
