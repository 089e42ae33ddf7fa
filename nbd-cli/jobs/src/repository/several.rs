//! Backups of several disks.

use std::sync::Arc;

use nbd_client::Client;
use nbd_objects::repo::{DISKS_MAX, DiskHead, Head, Id, NewBackup, are_names, lay_out};
use nbd_proto::NbdUri;
use nbd_proto::wire::MetaContextName;

use super::job::{Disk, Parts, Work};
use super::options::{BackedUpToRepository, DiskToBackUp};
use crate::backup::{BackupSource, connect_to_disk, context_of};
use crate::copy::source::Source;
use crate::error::JobError;
use crate::text::printable;

/// One of the disks of a backup.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct NamedDisk {
    /// Its name in the backup: 1 to 128 bytes, without `/`, `@`, `#`, `=`, `:` and control
    /// characters.
    pub name: String,
    /// Where it is read.
    pub disk: DiskToBackUp,
}

impl NamedDisk {
    /// Names a disk.
    pub fn new(name: impl Into<String>, disk: DiskToBackUp) -> Self {
        Self { name: name.into(), disk }
    }
}

/// An open disk.
pub(super) struct Opened {
    pub(super) head: DiskHead,
    pub(super) source: Source,
    pub(super) client: Option<Client>,
    /// The bitmap, if it started with the base: only what is dirty is read.
    pub(super) dirty: Option<MetaContextName>,
}

/// Refuses names that cannot be, before anything is begun.
pub(super) fn check(disks: &[NamedDisk]) -> Result<(), JobError> {
    if !disks.is_empty() && are_names(disks.iter().map(|disk| &*disk.name)) {
        return Ok(());
    }
    Err(JobError::invalid(format!(
        "a backup has 1 to {DISKS_MAX} disks, and each has a name of its own of 1 to 128 bytes, without \
         '/', '@', '#', '=', ':' and control characters"
    )))
}

/// Says where each disk begins, and sorts them by that.
pub(super) fn place(opened: &mut [Opened], base: Option<&Head>) -> Result<(), JobError> {
    let mut heads: Vec<_> = opened.iter().map(|disk| disk.head.clone()).collect();
    lay_out(&mut heads, base.map_or(&[], |base| &base.disks))
        .ok_or_else(|| JobError::source("the disks are too large for a backup"))?;
    let at = |name: &str| heads.iter().find(|head| head.name == name).map_or(0, |head| head.offset);
    opened.iter_mut().for_each(|disk| disk.head.offset = at(&disk.head.name));
    // One without a byte may be where another one begins.
    opened.sort_by_key(|disk| (disk.head.offset, disk.head.size));
    Ok(())
}

/// Backs up open disks.
pub(super) async fn run(
    work: &Work<'_>,
    opened: Vec<Opened>,
) -> Result<BackedUpToRepository, JobError> {
    let mut new = NewBackup::new(work.options.name.clone());
    new.disks = opened.iter().map(|disk| disk.head.clone()).collect();
    new.size = new.disks.last().map_or(0, |last| last.offset + last.size);
    let disks: Vec<_> = opened
        .iter()
        .map(|disk| Disk {
            name: Some(disk.head.name.clone()),
            source: Arc::new(disk.source.clone()),
            parts: match (&disk.client, &disk.dirty) {
                (Some(client), Some(bitmap)) => Parts::Dirty(client, bitmap),
                _ => Parts::All,
            },
            start: disk.head.offset,
        })
        .collect();
    let result = work.run_all(&disks, new).await;
    drop(disks);
    for disk in opened {
        // Everything was read, so the way in which the connection ends does not matter.
        if let Some(client) = disk.client {
            let _ = client.disconnect().await;
        }
    }
    result
}

/// Opens a disk in its current state: with its bitmap, if the last backup has the disk.
pub(super) async fn open(
    work: &Work<'_>,
    disk: &NamedDisk,
    last: Option<&(Id, Head)>,
) -> Result<Opened, JobError> {
    let mut head = DiskHead { name: disk.name.clone(), ..DiskHead::default() };
    match &disk.disk {
        DiskToBackUp::Image(image) => {
            if work.options.bitmap.is_some() {
                return Err(JobError::invalid(
                    "--bitmap is for disks of servers; serve the image, or leave it out",
                ));
            }
            let source = Source::image(Arc::clone(image));
            head.size = source.size().unwrap_or_default();
            Ok(Opened { head, source, client: None, dirty: None })
        }
        DiskToBackUp::Served(served) => {
            let BackupSource::Export(uri) = &**served else {
                return Err(JobError::invalid("a disk at a checkpoint is not opened by its URI"));
            };
            work.options.connect.tls.check([uri])?;
            head.origin.export = Some(uri.export_name.clone());
            head.origin.bitmap.clone_from(&work.options.bitmap);
            let bitmap = work.options.bitmap.as_deref();
            let is_known = last
                .is_some_and(|(_, last)| last.disks.iter().any(|other| other.name == disk.name));
            let wanted = bitmap.filter(|_| is_known).map(context_of).transpose()?;
            open_served(work, uri, head, wanted).await
        }
    }
}

/// Opens an export, with its bitmap.
pub(super) async fn open_served(
    work: &Work<'_>,
    uri: &NbdUri,
    mut head: DiskHead,
    bitmap: Option<MetaContextName>,
) -> Result<Opened, JobError> {
    let client = connect_to_disk(&work.options.connect, work.context, uri, bitmap.as_ref()).await?;
    let source = Source::Nbd { client: client.clone(), uri: uri.clone() };
    head.size = source.size().unwrap_or_default();
    Ok(Opened { head, source, client: Some(client), dirty: bitmap })
}

/// Returns the bitmap of a disk, if it started with the last backup.
pub(super) fn follows(
    work: &Work<'_>,
    disk: &DiskHead,
    last: Option<&(Id, Head)>,
) -> Result<Option<MetaContextName>, JobError> {
    let (Some(bitmap), Some((_, last))) = (&disk.origin.bitmap, last) else { return Ok(None) };
    let is_it = |other: &&DiskHead| {
        other.is_same_place(disk)
            && other.origin.bitmap == disk.origin.bitmap
            && other.origin.export == disk.origin.export
    };
    if last.disks.iter().any(|other| is_it(&other)) {
        return context_of(bitmap).map(Some);
    }
    work.reads_all(&format!(
        "the last backup of '{}' has no disk '{}' with this export, size and bitmap at the same place",
        printable(&work.options.name),
        printable(&disk.name)
    ));
    Ok(None)
}
