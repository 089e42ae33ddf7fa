//! The begin and the end of a checkpoint.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use imgfmt::{BitmapChange, BitmapInfo, GuestOffset, GuestRange, Recording};
use nbd_proto::wire::{BlockDescriptor, Errno, MetaContextName};
use nbd_server::InUse;
use nbd_server::export::{
    CheckpointError, Checkpointed, Descriptors, ExportError, ImageExport, PointInTimeView,
};
use rustix::fs::{CWD, Mode, OFlags, openat};
use serde_json::{Value, json};

use super::disks::{CheckpointBitmap, RunningCheckpoint};
use super::{Controller, ConversationId, Disks, blocking};
use crate::control::{Begun, ErrorKind, Failure, IfMissing, Verdict};
use crate::serving::leftover;

/// What stands behind the name of an export in that of its view.
const VIEW_SUFFIX: &str = ".checkpoint";

/// Set in the status of a dirty range.
const DIRTY: u64 = 1;

/// The checkpoint that somebody wants.
pub(super) struct CheckpointWish {
    pub(super) bitmap: Option<String>,
    pub(super) if_missing: IfMissing,
    /// Name of the view's export.
    pub(super) view: Option<String>,
    /// The conversation it is to end with.
    pub(super) conversation: Option<ConversationId>,
}

impl Controller {
    pub(super) async fn begin_checkpoint(
        &self,
        disks: &mut Disks,
        export: &str,
        CheckpointWish { bitmap, if_missing, view, conversation }: CheckpointWish,
    ) -> Result<Value, Failure> {
        let disk = disks.get_mut(export)?;
        let view_name = view.unwrap_or_else(|| format!("{export}{VIEW_SUFFIX}"));
        if self.server.exports().entries().iter().any(|(taken, _)| *taken == view_name) {
            let message = format!("there is an export named '{view_name}' already");
            return Err(Failure::new(ErrorKind::AlreadyExists, message));
        }
        let image = bitmap.as_ref().map(|_| disk.image()).transpose()?;
        let checkpointed = disk.export.clone();
        let begun = blocking(move || match (image, bitmap) {
            (Some(image), Some(name)) => begin_with_bitmap(&checkpointed, &image, name, if_missing),
            _ => {
                let view = begin(&checkpointed, || Ok(()))?;
                Ok((view, None))
            }
        });
        let (view, bitmap) = begun.await??;
        let frozen = bitmap.as_ref().filter(|bitmap| bitmap.frozen.is_some());
        let reply = Begun {
            view: view_name.clone(),
            bitmap: frozen.map(|bitmap| bitmap.name.clone()),
            uris: (self.uris)(&view_name),
        };
        disk.checkpoint = Some(RunningCheckpoint { view: view_name.clone(), bitmap, conversation });
        // Who may not use the disk may not use its view either.
        let entry = self.server.exports().find(export).map(|(_, entry)| entry);
        let entry = entry.unwrap_or_else(|| disk.entry()).with_export(Arc::new(view));
        let entry = entry.description(format!("'{export}' at one moment"));
        if let Err(error) = self.server.exports().add(view_name, entry) {
            self.abandon_checkpoint(disks, export).await?;
            return Err(Failure::new(ErrorKind::InvalidRequest, error.to_string()));
        }
        tracing::info!(%export, view = %reply.view, "checkpoint begun");
        serde_json::to_value(reply)
            .map_err(|error| Failure::new(ErrorKind::Failed, error.to_string()))
    }

    pub(super) async fn end_checkpoint(
        &self,
        disks: &mut Disks,
        export: &str,
        outcome: Verdict,
    ) -> Result<Value, Failure> {
        let disk = disks.get_mut(export)?;
        let checkpoint = disk.checkpoint.clone().ok_or_else(|| {
            let message = format!("no checkpoint of '{export}' is in progress");
            Failure::new(ErrorKind::NotFound, message)
        })?;
        if outcome == Verdict::Success
            && let Some(why) = disk.export.failure().flatten()
        {
            let message = format!(
                "the view of '{export}' was lost ({why}), so what was read from it is no backup; \
                 end the checkpoint with failure"
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
        self.end_checkpoint(disks, export, Verdict::Failure).await
    }
}

fn begin(
    disk: &Checkpointed,
    at_switch: impl FnOnce() -> imgfmt::Result<()>,
) -> Result<PointInTimeView, Failure> {
    let file = nameless_file().map_err(|error| {
        let message = format!(
            "cannot make a file for what will be overwritten: {error}; set TMPDIR to a folder with \
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

fn begin_with_bitmap(
    disk: &Checkpointed,
    image: &Arc<ImageExport>,
    name: String,
    if_missing: IfMissing,
) -> Result<(PointInTimeView, Option<CheckpointBitmap>), Failure> {
    let known = image.image().bitmaps();
    let find = |name: &str| known.iter().find(|bitmap| bitmap.name == name);
    let Some(found) = find(&name) else {
        if if_missing == IfMissing::Fail {
            let message = format!("the image has no bitmap '{name}'");
            return Err(Failure::new(ErrorKind::NotFound, message));
        }
        let granularity = imgfmt::BITMAP_GRANULARITY_DEFAULT;
        let recording = Recording::Enabled;
        let add = BitmapChange::Add { name: name.clone(), granularity, recording };
        let view = begin(disk, || image.image().bitmap_transaction(&[add]))?;
        return Ok((view, Some(CheckpointBitmap { name, frozen: None, was_offered: false })));
    };
    if found.recording == Recording::Disabled {
        let message = format!(
            "the bitmap '{name}' is disabled and has not noted every change; enable it and make a \
             full backup"
        );
        return Err(Failure::new(ErrorKind::InvalidRequest, message));
    }
    let frozen = leftover::set_aside_name(&name);
    let changes = freeze(found, &frozen, leftover::set_aside(&known, found).is_some());
    let context = MetaContextName::qemu_dirty_bitmap(&name)
        .map_err(|error| Failure::new(ErrorKind::InvalidRequest, error.to_string()))?;
    // Clients of the disk itself would miss the bits that are set aside.
    let was_offered = image.withdraw_bitmap(&name);
    let bitmap = CheckpointBitmap { name, frozen: Some(frozen.clone()), was_offered };
    let begun = begin(disk, || image.image().bitmap_transaction(&changes));
    let view = begun.inspect_err(|_| offer_again(image, &bitmap))?;
    let image = Arc::clone(image);
    let status =
        move |offset, length, max_count| dirty_status(&image, &frozen, offset, length, max_count);
    let view = view.with_context(context, Box::new(status));
    Ok((view, Some(bitmap)))
}

/// The disk's export offers the bitmap as before the checkpoint.
fn offer_again(image: &ImageExport, bitmap: &CheckpointBitmap) {
    if bitmap.was_offered
        && let Err(error) = image.offer_bitmap(&bitmap.name)
    {
        tracing::error!(bitmap = %bitmap.name, %error, "bitmap not offered again");
    }
}

/// Copies the bits of a bitmap into another one, and begins it anew.
fn freeze(bitmap: &BitmapInfo, frozen: &str, is_left_over: bool) -> Vec<BitmapChange> {
    let (name, frozen) = (bitmap.name.clone(), frozen.to_owned());
    let mut changes = Vec::new();
    if is_left_over {
        // They could not be put back when the image was opened. They are still to be backed up.
        changes.push(BitmapChange::Merge { into: name.clone(), from: frozen.clone() });
        changes.push(BitmapChange::Remove { name: frozen.clone() });
    }
    let (granularity, recording) = (bitmap.granularity, Recording::Disabled);
    changes.push(BitmapChange::Add { name: frozen.clone(), granularity, recording });
    changes.push(BitmapChange::Merge { into: frozen, from: name.clone() });
    changes.push(BitmapChange::Clear { name });
    changes
}

/// Drops frozen bits, or puts them back.
fn settle(image: &ImageExport, bitmap: &CheckpointBitmap, outcome: Verdict) -> Result<(), Failure> {
    let name = bitmap.name.clone();
    let changes = match (&bitmap.frozen, outcome) {
        (None, Verdict::Success) => return Ok(()),
        // Nothing was noted before the checkpoint: nothing can be built on what was noted since.
        (None, Verdict::Failure) => vec![BitmapChange::Remove { name }],
        (Some(frozen), Verdict::Success) => vec![BitmapChange::Remove { name: frozen.clone() }],
        (Some(frozen), Verdict::Failure) => vec![
            BitmapChange::Merge { into: name, from: frozen.clone() },
            BitmapChange::Remove { name: frozen.clone() },
        ],
    };
    image.image().bitmap_transaction(&changes)?;
    offer_again(image, bitmap);
    Ok(())
}

/// What a frozen bitmap says, as block status.
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

/// A file without a name, in TMPDIR or else in /var/tmp.
fn nameless_file() -> io::Result<File> {
    let folder = std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match openat(CWD, &folder, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        // Not every file system can do that.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
            let path = folder.join(format!("nbd-cli-{}.checkpoint", std::process::id()));
            let file = File::options().read(true).write(true).create_new(true).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        }
        Err(error) => Err(error.into()),
    }
}
