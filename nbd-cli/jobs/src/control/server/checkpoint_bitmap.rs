//! The bitmap of a checkpoint, and the file of its overwritten data.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use imgfmt::{
    BeganAfter, BitmapChange, BitmapInfo, BitmapState, GuestOffset, GuestRange, Recording, Uuid,
};
use nbd_proto::wire::{BlockDescriptor, Errno, MetaContextName};
use nbd_server::export::{
    CheckpointError, Checkpointed, Descriptors, ExportError, ImageExport, PointInTimeView,
};
use rustix::fs::{CWD, Mode, OFlags, openat};

use super::disks::{BitmapOrigin, CheckpointBitmap};
use super::event::{ControlEvent, ControlObserver};
use crate::control::{ErrorKind, Failure, IfMissing, IfUnusable, Outcome};
use crate::text::printable;

/// Set in the status of a dirty range.
const DIRTY: u64 = 1;

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

/// The failure of a checkpoint whose disk is not ready in time.
pub(super) fn not_ready(terms: &CheckpointTerms) -> Failure {
    let message = format!(
        "no checkpoint was started: after {} s, writes to '{}' that were in flight or a change of \
         its bitmap have not ended; what the disk is on may hang",
        terms.patience.as_secs_f64(),
        printable(&terms.export)
    );
    Failure::new(ErrorKind::Failed, message)
}

/// Starts a checkpoint; `at_switch` is called between two writes.
pub(super) fn begin(
    disk: &Checkpointed,
    terms: &CheckpointTerms,
    at_switch: &mut dyn FnMut() -> Result<(), Failure>,
) -> Result<PointInTimeView, Failure> {
    let file = nameless_file(&terms.temporary_directory, terms.backup).map_err(|error| {
        let message = format!(
            "cannot create a file for overwritten data: {error}; set TMPDIR to a directory with \
             room"
        );
        Failure::new(ErrorKind::Failed, message)
    })?;
    disk.begin(file, terms.patience, at_switch).map_err(|error| match error {
        CheckpointError::AtSwitch(failure) => failure,
        CheckpointError::Busy(_) => not_ready(terms),
        CheckpointError::InProgress => Failure::new(ErrorKind::InUse, error.to_string()),
        error => Failure::new(ErrorKind::Failed, error.to_string()),
    })
}

/// The terms of a checkpoint.
pub(super) struct CheckpointTerms {
    pub(super) export: String,
    /// The time for writes in flight.
    pub(super) patience: Duration,
    pub(super) if_missing: IfMissing,
    pub(super) if_unusable: IfUnusable,
    pub(super) base: RequestedBase,
    /// The identity of the new backup.
    pub(super) backup: Uuid,
    /// Directory of the file for overwritten data.
    pub(super) temporary_directory: PathBuf,
    pub(super) observer: Arc<ControlObserver>,
}

/// A checkpoint in progress.
pub(super) struct StartedCheckpoint {
    pub(super) view: PointInTimeView,
    pub(super) bitmap: Option<CheckpointBitmap>,
    /// The reason why the bitmap was unreliable, if it was restarted for that reason.
    pub(super) restart_reason: Option<String>,
}

impl StartedCheckpoint {
    pub(super) fn without_bitmap(view: PointInTimeView) -> Self {
        Self { view, bitmap: None, restart_reason: None }
    }
}

/// Starts a checkpoint at which a bitmap is frozen, or added. `then` is called while no write is
/// carried out; if it fails, the bitmap is as before.
pub(super) fn start_with_bitmap(
    disk: &Checkpointed,
    image: &Arc<ImageExport>,
    name: String,
    terms: &CheckpointTerms,
    then: &mut dyn FnMut() -> Result<(), Failure>,
) -> Result<StartedCheckpoint, Failure> {
    let known = image.image().bitmaps();
    let Some(found) = known.iter().find(|bitmap| bitmap.name == name) else {
        if terms.if_missing == IfMissing::Fail {
            let message = format!("the image has no bitmap '{name}'");
            return Err(Failure::new(ErrorKind::NotFound, message));
        }
        let changes = added_dirty(&name, terms.backup);
        let bitmap = CheckpointBitmap { name, origin: BitmapOrigin::Added };
        let view = begin(disk, terms, &mut || freeze(image, &changes, &bitmap, then))?;
        return Ok(StartedCheckpoint { view, bitmap: Some(bitmap), restart_reason: None });
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
    let started = begin(disk, terms, &mut || freeze(image, &changes, &bitmap, then));
    let view = started.inspect_err(|_| offer_again(image, &bitmap, &*terms.observer))?;
    let (image, frozen) = (Arc::clone(image), bitmap.frozen());
    let observer = terms.observer.clone();
    let status = move |offset, length, max_count| {
        dirty_status(&image, &frozen, (offset, length), max_count, &*observer)
    };
    let view = view.with_context(context, Box::new(status));
    let restart_reason = problem.filter(|_| terms.if_unusable == IfUnusable::Restart);
    Ok(StartedCheckpoint { view, bitmap: Some(bitmap), restart_reason })
}

/// Changes a bitmap at the switch; if `then` fails, back.
fn freeze(
    image: &ImageExport,
    changes: &[BitmapChange],
    bitmap: &CheckpointBitmap,
    then: &mut dyn FnMut() -> Result<(), Failure>,
) -> Result<(), Failure> {
    image.image().bitmap_transaction(changes)?;
    let Err(failure) = then() else { return Ok(()) };
    image.image().bitmap_transaction(&end_of(bitmap, Outcome::Failure))?;
    Err(failure)
}

/// What becomes of the bitmap at the end of a checkpoint.
fn end_of(bitmap: &CheckpointBitmap, outcome: Outcome) -> Vec<BitmapChange> {
    let name = bitmap.name.clone();
    match (bitmap.origin, outcome) {
        (_, Outcome::Success) => vec![BitmapChange::DropFrozen { name }],
        // Nothing was recorded before the checkpoint, so no backup can build on the changes
        // recorded since.
        (BitmapOrigin::Added, Outcome::Failure) => {
            let names = [name, bitmap.frozen()];
            names.into_iter().map(|name| BitmapChange::Remove { name }).collect()
        }
        (_, Outcome::Failure) => vec![BitmapChange::Thaw { name }],
    }
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
fn offer_again(image: &ImageExport, bitmap: &CheckpointBitmap, observer: &ControlObserver) {
    let is_possible = MetaContextName::qemu_dirty_bitmap(&bitmap.name).is_ok();
    if bitmap.origin != BitmapOrigin::NotOffered
        && is_possible
        && let Err(error) = image.offer_bitmap(&bitmap.name)
    {
        observer(&ControlEvent::BitmapNotOffered { bitmap: &bitmap.name, error: &error });
    }
}

/// Drops frozen bits, or merges them back.
pub(super) fn settle(
    image: &ImageExport,
    bitmap: &CheckpointBitmap,
    outcome: Outcome,
    observer: &ControlObserver,
) -> Result<(), Failure> {
    image.image().bitmap_transaction(&end_of(bitmap, outcome))?;
    if outcome == Outcome::Success || bitmap.origin != BitmapOrigin::Added {
        offer_again(image, bitmap, observer);
    }
    Ok(())
}

/// Returns a frozen bitmap as block status.
fn dirty_status(
    image: &ImageExport,
    bitmap: &str,
    (offset, length): (u64, u64),
    max_count: usize,
    observer: &ControlObserver,
) -> Result<Vec<BlockDescriptor>, ExportError> {
    let outside = || ExportError::new(Errno::EINVAL, "the range is outside the image");
    let range = GuestRange::new(GuestOffset::new(offset), length).ok_or_else(outside)?;
    let found = image.image().dirty_extents(bitmap, range, max_count).map_err(|error| {
        observer(&ControlEvent::FrozenBitsUnreadable { error: &error });
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

/// Creates a file without a name.
fn nameless_file(directory: &Path, backup: Uuid) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match openat(CWD, directory, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        // Not every file system supports that.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
            let path = directory.join(format!("nbd-cli-{backup}.checkpoint"));
            let file = File::options().read(true).write(true).create_new(true).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        }
        Err(error) => Err(error.into()),
    }
}
