//! Backups of a disk in use: a checkpoint is started, backed up and ended through the control socket
//! of its server.

use imgfmt::Uuid;
use nbd_objects::repo::{Head, Id};

use super::job::{Described, Work};
use super::options::BackedUpToRepository;
use crate::backup::checkpoint::{Server, Socket, not_understood, uri_of_view};
use crate::control::{IfMissing, IfUnusable, Lifetime, Listing, Outcome, Request};
use crate::{JobError, JobErrorKind};

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
    let is_it = |head: &Head| {
        head.identity.as_deref().and_then(|it| it.parse().ok()) == Some(start)
            && head.size == export.size
    };
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
        export: Some(server.export.to_owned()),
        bitmap: work.options.bitmap.clone(),
        identity: Some(issued.backup.to_string()),
        disk: issued.disk.map(|disk| disk.to_string()),
        imported: None,
    };
    let dirty = bitmap.filter(|_| is_incremental);
    let copied = work.run_served(&uri, dirty, &described).await;
    copied.map_err(|error| match error.kind() {
        JobErrorKind::Interrupted => {
            error.in_words(format!("{error}; the next backup sends what is missing"))
        }
        _ => error,
    })
}
