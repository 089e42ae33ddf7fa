//! Backups of a disk in use: a checkpoint is started, backed up and ended through the control
//! socket of its server.

use std::path::{Path, PathBuf};

use imgfmt::Uuid;
use nbd_objects::repo::{DiskHead, DiskOrigin, Head, Id};

use super::identity::identity_in;
use super::job::{Described, Work};
use super::options::{BackedUpToRepository, DiskToBackUp};
use super::several::{NamedDisk, open_served, place, run};
use crate::backup::checkpoint::{Server, Socket, not_understood, uri_of_view};
use crate::backup::{BackupSource, context_of};
use crate::control::{
    IfMissing, IfUnusable, Lifetime, Listing, Outcome, Request, TogetherCheckpoint,
};
use crate::error::{JobError, JobErrorKind};

/// Starts a checkpoint, backs it up, and ends it with the result: the bitmap restarts only when the
/// backup is durable.
pub(super) async fn backup(
    work: &mut Work<'_>,
    server: Server<'_>,
    earlier: &[(Id, Head)],
) -> Result<BackedUpToRepository, JobError> {
    let mut socket = Socket::open(server.socket, &work.options.connect).await?;
    let export = server.export.to_owned();
    let bitmap = work.options.bitmap.clone();
    let base = match &bitmap {
        Some(bitmap) if !work.options.full => {
            let listing = socket.call(Request::List {}).await?;
            let listing = serde_json::from_value(listing).map_err(|_| not_understood())?;
            start_of(bitmap, &export, &listing, earlier)
        }
        _ => None,
    };
    if let Some((id, _)) = &base {
        work.base = Some(*id);
    } else if bitmap.is_some() && !work.options.full && !earlier.is_empty() {
        work.reads_all("no backup of this name is the one with which the bitmap started");
    }
    let begin = Request::CheckpointStart {
        export: export.clone(),
        bitmap: bitmap.clone(),
        if_missing: if base.is_none() { IfMissing::Add } else { IfMissing::Fail },
        // A backup of everything does not need the recorded changes.
        if_unusable: if base.is_none() { IfUnusable::Restart } else { IfUnusable::Fail },
        view: None,
        base: base.as_ref().map(|(_, identity)| identity.to_string()),
        trust_base: false,
        // If this process is killed, no other process ends the checkpoint.
        lifetime: Lifetime::Connection,
    };
    let started = socket.call(begin).await?;
    let result = copy(work, server, base.is_some(), started).await;
    let outcome = if result.is_ok() { Outcome::Success } else { Outcome::Failure };
    socket.wait_without_limit();
    let ended = socket.call(Request::CheckpointEnd { export, outcome }).await;
    match (result, ended) {
        (Ok(made), Err(error)) => {
            // It is complete all the same. The bitmap still belongs to the backup before.
            work.context.observer.warning(&format!(
                "the backup is complete, but its server could not be told: {error}; the next one \
                 may read the whole disk"
            ));
            Ok(made)
        }
        (Err(error), Err(second)) => {
            work.context.observer.warning(&format!(
                "the checkpoint could not be ended: {second}; end it with `nbd-cli control`"
            ));
            Err(error)
        }
        (result, Ok(_)) => result,
    }
}

/// Finds the backup after which a bitmap started.
fn start_of(
    bitmap: &str,
    export: &str,
    listing: &Listing,
    earlier: &[(Id, Head)],
) -> Option<(Id, Uuid)> {
    let export = listing.exports.iter().find(|found| found.name == export)?;
    let found = export.bitmaps.iter().find(|found| found["name"] == bitmap)?;
    let start: Uuid = found["began-after"].as_str()?.parse().ok()?;
    let is_it = |head: &Head| identity_in(&head.origin) == Some(start) && head.size == export.size;
    let (id, _) = earlier.iter().find(|(_, head)| is_it(head))?;
    Some((*id, start))
}

async fn copy(
    work: &Work<'_>,
    server: Server<'_>,
    is_incremental: bool,
    started: serde_json::Value,
) -> Result<BackedUpToRepository, JobError> {
    let (connect, observer) = (&work.options.connect, &*work.context.observer);
    let bitmap = work.options.bitmap.as_deref();
    let (uri, issued) = uri_of_view((connect, observer, bitmap), server, started)?;
    let described = Described {
        origin: origin_of((issued.backup, issued.disk), server.export, work),
        imported: None,
    };
    let dirty = bitmap.filter(|_| is_incremental);
    work.run_served(&uri, dirty, &described).await.map_err(told_what_next)
}

/// Returns where the disk of a checkpoint comes from: the identities are those of the backup and,
/// if its server has one, of the disk.
fn origin_of((backup, disk): (Uuid, Option<Uuid>), export: &str, work: &Work<'_>) -> DiskOrigin {
    DiskOrigin {
        identity: Some(backup.to_string()),
        disk: disk.map(|disk| disk.to_string()),
        export: Some(export.to_owned()),
        bitmap: work.options.bitmap.clone(),
    }
}

/// The backup after which a bitmap started, and the size of its disk, if they are known.
type Start = Option<(Uuid, u64)>;

/// Backs up disks of one server in their state at one moment.
pub(super) async fn backup_together(
    work: &mut Work<'_>,
    disks: &[NamedDisk],
    earlier: &[(Id, Head)],
) -> Result<BackedUpToRepository, JobError> {
    let mut served = Vec::new();
    for disk in disks {
        match &disk.disk {
            DiskToBackUp::Served(source) => match &**source {
                BackupSource::Checkpoint { socket, export, uri: None } => {
                    served.push((&*disk.name, socket, &**export));
                }
                _ => return Err(not_together()),
            },
            DiskToBackUp::Image(_) => return Err(not_together()),
        }
    }
    let Some(&(_, path, _)) = served.first() else { return Err(not_together()) };
    if served.iter().any(|(_, socket, _)| *socket != path) {
        return Err(not_together());
    }
    let mut socket = Socket::open(path, &work.options.connect).await?;
    let starts = starts(work, &mut socket, &served, earlier).await?;
    let checkpoints =
        served.iter().zip(&starts).map(|((_, _, export), start)| TogetherCheckpoint {
            export: (*export).to_owned(),
            bitmap: work.options.bitmap.clone(),
            if_missing: if start.is_none() { IfMissing::Add } else { IfMissing::Fail },
            if_unusable: if start.is_none() { IfUnusable::Restart } else { IfUnusable::Fail },
            base: start.map(|(start, _)| start.to_string()),
        });
    let begin = Request::CheckpointStartTogether {
        checkpoints: checkpoints.collect(),
        lifetime: Lifetime::Connection,
    };
    let started = socket.call(begin).await?;
    let base = work.base_in(earlier);
    let result = copy_together(work, (path, &served), (&starts, base), started).await;
    let outcome = if result.is_ok() { Outcome::Success } else { Outcome::Failure };
    socket.wait_without_limit();
    for (_, _, export) in &served {
        let export = (*export).to_owned();
        if let Err(error) = socket.call(Request::CheckpointEnd { export, outcome }).await {
            work.context.observer.warning(&format!(
                "a checkpoint could not be ended: {error}; the next backup may read the whole disk"
            ));
        }
    }
    result
}

/// Returns for each disk the backup after which its bitmap started, if that is the base.
async fn starts(
    work: &mut Work<'_>,
    socket: &mut Socket,
    served: &[(&str, &PathBuf, &str)],
    earlier: &[(Id, Head)],
) -> Result<Vec<Start>, JobError> {
    let Some(bitmap) = work.options.bitmap.as_ref().filter(|_| !work.options.full) else {
        return Ok(vec![None; served.len()]);
    };
    let listing = socket.call(Request::List {}).await?;
    let listing = serde_json::from_value(listing).map_err(|_| not_understood())?;
    let mut starts: Vec<_> =
        served.iter().map(|(_, _, export)| began_after(bitmap, export, &listing)).collect();
    // One backup as the base of all: that with which most of the bitmaps started.
    let followed = |head: &Head| {
        let disks = served.iter().zip(&starts);
        disks.filter(|((name, ..), start)| is_start(head, name, **start)).count()
    };
    let base = earlier.iter().rev().max_by_key(|(_, head)| followed(head));
    match base.filter(|(_, head)| followed(head) > 0) {
        Some((id, head)) => {
            work.base = Some(*id);
            for ((name, ..), start) in served.iter().zip(&mut starts) {
                *start = start.filter(|start| is_start(head, name, Some(*start)));
            }
        }
        None => starts.fill(None),
    }
    if !earlier.is_empty() && starts.contains(&None) {
        work.reads_all("no backup of this name is the one with which all bitmaps started");
    }
    Ok(starts)
}

fn not_together() -> JobError {
    JobError::invalid("with --control, all disks of a backup are exports of that server")
}

/// Returns the backup after which a bitmap started.
fn began_after(bitmap: &str, export: &str, listing: &Listing) -> Start {
    let export = listing.exports.iter().find(|found| found.name == export)?;
    let found = export.bitmaps.iter().find(|found| found["name"] == bitmap)?;
    Some((found["began-after"].as_str()?.parse().ok()?, export.size))
}

/// Returns whether a backup has a disk of that size, after the backup of which a bitmap started.
fn is_start(head: &Head, name: &str, start: Start) -> bool {
    let is_it = |disk: &DiskHead, (start, size): (Uuid, u64)| {
        disk.name == name && disk.size == size && identity_in(&disk.origin) == Some(start)
    };
    start.is_some_and(|start| head.disks.iter().any(|disk| is_it(disk, start)))
}

/// Copies the views of checkpoints that were started together.
async fn copy_together(
    work: &Work<'_>,
    (socket, served): (&Path, &[(&str, &PathBuf, &str)]),
    (starts, base): (&[Start], Option<&Head>),
    started: serde_json::Value,
) -> Result<BackedUpToRepository, JobError> {
    let started: Vec<serde_json::Value> =
        serde_json::from_value(started).map_err(|_| not_understood())?;
    if started.len() != served.len() {
        return Err(not_understood());
    }
    let (connect, observer) = (&work.options.connect, &*work.context.observer);
    let bitmap = work.options.bitmap.as_deref();
    let mut opened = Vec::new();
    for (((name, _, export), started), start) in served.iter().zip(started).zip(starts) {
        let server = Server { socket, export, uri: None };
        let (uri, issued) = uri_of_view((connect, observer, bitmap), server, started)?;
        let head = DiskHead {
            name: (*name).to_owned(),
            origin: origin_of((issued.backup, issued.disk), export, work),
            ..DiskHead::default()
        };
        let dirty = bitmap.filter(|_| start.is_some()).map(context_of).transpose()?;
        opened.push(open_served(work, &uri, head, dirty).await?);
    }
    place(&mut opened, base)?;
    // At another place, the base has another disk.
    for disk in &mut opened {
        let is_there =
            base.is_some_and(|base| base.disks.iter().any(|other| other.is_same_place(&disk.head)));
        disk.dirty = disk.dirty.take().filter(|_| is_there);
    }
    run(work, opened).await.map_err(told_what_next)
}

fn told_what_next(error: JobError) -> JobError {
    match error.kind() {
        JobErrorKind::Interrupted => {
            let words = format!("{error}; the next backup sends what is missing");
            error.in_words(words)
        }
        _ => error,
    }
}
