//! One file of an export.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, UNIX_EPOCH};

use imgfmt::{
    BackupBase, BackupIdentity, ContentSum, CreateOptions, Format, Image, OpenOptions, Storage,
};
use nbd_client::ZeroMode;
use nbd_objects::repo::{BLOCK_SIZE, Difference, Head, Id, OpenBackup};
use tokio::sync::mpsc::{Sender, channel};

use super::super::identity::identity_of;
use super::super::options::repository_error;
use super::folder::{Folder, options};
use crate::connect::ConnectOptions;
use crate::copy::again;
use crate::copy::content::Content;
use crate::copy::destination::{Background, Destination};
use crate::copy::job::{Job, Settings, ZeroPolicy};
use crate::copy::plan::Extents;
use crate::copy::source::Source;
use crate::copy::sum::{OfLayers, Sum};
use crate::error::{JobError, JobErrorKind};
use crate::observer::JobContext;
use crate::target::{Durable, NewFile};
use crate::tasks;

/// Size of a request, in bytes.
const REQUEST_SIZE: u64 = 1 << 20;
/// Requests in flight.
const REQUESTS: usize = 16;
/// Parts of the disk that wait to be copied.
const PARTS: usize = 64;

/// The file below a new one.
pub(super) struct Base {
    pub(super) backup: Arc<OpenBackup>,
    pub(super) id: Id,
    pub(super) head: Head,
    /// Its name in the folder.
    pub(super) name: String,
    /// Files of its chain.
    pub(super) depth: usize,
}

impl Base {
    /// Returns whether a file of such a disk can be made upon it. An image ends at a multiple of
    /// 512: behind the end of a smaller disk, the data of a larger one would be seen there.
    pub(super) fn fits(&self, head: &Head) -> bool {
        self.head.size <= head.size || head.size.is_multiple_of(512)
    }
}

/// A file that is to be made.
pub(super) struct New<'a> {
    pub(super) path: &'a Path,
    pub(super) id: Id,
    pub(super) head: &'a Head,
    pub(super) base: Option<&'a Base>,
}

impl New<'_> {
    /// Makes the file; returns the bytes of the disk that were written.
    pub(super) async fn write(
        &self,
        opened: &Arc<OpenBackup>,
        folder: &Folder,
        context: &JobContext,
    ) -> Result<u64, JobError> {
        folder.clear(self.path)?;
        let mut create = CreateOptions::new(Format::Qcow2, self.head.size);
        create.cluster_size = BLOCK_SIZE;
        create.backing = self.base.map(|base| ((&*base.name).into(), Format::Qcow2));
        create.open = options().written_once();
        let make = |path: &Path| Image::create(path, &create).map_err(image_error);
        let (new, image) = NewFile::begin(self.path, &context.observer, make)?;
        let (copied, content) = self.fill(image, opened, context).await?;
        let mut identity = BackupIdentity::new(identity_of(self.id, self.head)?, self.head.size);
        if let Some(base) = self.base {
            identity.base = BackupBase::Backup(identity_of(base.id, &base.head)?);
        }
        identity.disk = self.head.origin.disk.as_deref().and_then(|text| text.parse().ok());
        identity.content = content;
        // No name of an export: which backups were made since, and whether a bitmap started again,
        // is known to a server that knows the identity, and not to the files of this folder.
        identity.export = format!("{}@{} in a repository", self.head.name, self.id);
        let path = new.path().to_owned();
        let time = UNIX_EPOCH.checked_add(Duration::from_millis(self.head.time));
        let seal = move || {
            // What the file says of its time is that of the backup. It is of no further use.
            let file = File::options().write(true).open(&path);
            if let (Ok(file), Some(time)) = (file, time) {
                let _ = file.set_modified(time);
            }
            Image::seal_backup(&path, &options(), &identity).map_err(image_error)
        };
        let sealed = tasks::spawn_blocking(seal).await;
        sealed.map_err(|error| JobError::given_up("write", &error))??;
        new.complete(Durable::Now)?;
        Ok(copied)
    }

    /// Writes the disk into the image; returns the bytes, and the sum of what the file holds.
    async fn fill(
        &self,
        image: Image,
        opened: &Arc<OpenBackup>,
        context: &JobContext,
    ) -> Result<(u64, Option<ContentSum>), JobError> {
        let raw = OpenOptions::new().format(Format::Raw);
        let disk: Arc<dyn Storage> = Arc::clone(opened) as _;
        let disk = Image::from_storage(disk, &raw);
        let disk = disk.map_err(|error| JobError::image(JobErrorKind::Source, error))?;
        let source = Source::image(Arc::new(disk));
        let (extents, background, zeroes) = match self.base {
            None => (source.extents(0), Background::Zero, ZeroPolicy::Skip),
            Some(base) => {
                let (sender, told) = channel(PARTS);
                tasks::spawn(tell(Arc::clone(opened), Arc::clone(&base.backup), sender));
                // Zero clusters: holes would expose the layer below.
                let zeroes = ZeroPolicy::Write(ZeroMode::MayUnmap);
                (Extents::Told(told), Background::Unknown, zeroes)
            }
        };
        let settings = Settings {
            requests: REQUESTS,
            request_size: REQUEST_SIZE,
            unit: BLOCK_SIZE,
            zeroes,
            sparse: Some(BLOCK_SIZE),
            start: 0,
            lanes: ConnectOptions::default().on_lanes().lanes,
            sum: Some(Sum::OfLayers(OfLayers::new(self.head.size))),
        };
        let destination = Destination::image(image, background);
        let job = Arc::new(Job::new(settings, source, destination, extents, context));
        again::run(&job, true).await?;
        let copied = job.counts().data.load(Ordering::Relaxed);
        let job = Arc::into_inner(job).ok_or_else(|| {
            JobError::new(JobErrorKind::Internal, "a task of the export has not ended")
        })?;
        let content = match &job.sum {
            Some(Sum::OfLayers(sum)) => sum.of_layer(0),
            _ => None,
        };
        let destination = job.destination;
        let closed = tasks::spawn_blocking(move || destination.close_image()).await;
        closed.map_err(|error| JobError::given_up("write", &error))??;
        Ok((copied, content))
    }
}

/// Tells the parts of a backup, and what they are seen from another one: each as its end and its
/// content. Ends with an error, with the disk, or when nobody listens.
async fn tell(
    backup: Arc<OpenBackup>,
    base: Arc<OpenBackup>,
    told: Sender<Result<(u64, Content), JobError>>,
) {
    let size = backup.size();
    let mut block = 0;
    while block * BLOCK_SIZE < size {
        let part = match backup.difference(&base, block).await {
            Ok((kind, count)) => {
                block += count.max(1);
                let content = match kind {
                    Difference::Same => Content::Unchanged,
                    Difference::Zero => Content::Zero,
                    Difference::Data => Content::Data,
                };
                Ok(((block * BLOCK_SIZE).min(size), content))
            }
            Err(error) => Err(repository_error(error)),
        };
        let is_last = part.is_err();
        if told.send(part).await.is_err() || is_last {
            return;
        }
    }
}

fn image_error(error: imgfmt::Error) -> JobError {
    JobError::image(JobErrorKind::Destination, error)
}
