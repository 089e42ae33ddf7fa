//! Reads a disk and gives it to the repository.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use imgfmt::{Format, Image, OpenOptions, Storage};
use nbd_client::{Client, ReadMemory};
use nbd_objects::repo::{
    BLOCK_SIZE, Damage, DiskOrigin, Id, Made, NewBackup, Repository, Session, host_name,
};
use nbd_proto::NbdUri;
use nbd_proto::wire::MetaContextName;
use tokio::task::JoinHandle;

use super::options::{BackedUpToRepository, RepositoryOptions, repository_error};
use crate::backup::{connect_to_disk, context_of};
use crate::copy::content::Content;
use crate::copy::dirty::DirtyExtents;
use crate::copy::plan::{Extents, ImageExtents, Lengths, Plan};
use crate::copy::shared_plan::SharedPlan;
use crate::copy::source::Source;
use crate::copy::verify::Verification;
use crate::error::{JobError, JobErrorKind};
use crate::observer::{JobContext, Phase, Progress};
use crate::restore::Verify;
use crate::tasks;

/// Longest read, in bytes.
const READ: u64 = 1 << 20;
/// Longest part that is known without reading it, in bytes: whole blocks.
const KNOWN: u64 = 1 << 40;

/// What is recorded of the disk.
#[derive(Default)]
pub(super) struct Described {
    pub(super) origin: DiskOrigin,
    /// When an imported image was written last, in milliseconds since 1970, and what it was.
    pub(super) imported: Option<(u64, String)>,
}

/// What is read of a disk.
pub(super) enum Parts<'a> {
    All,
    /// What is dirty in this bitmap of its server.
    Dirty(&'a Client, &'a MetaContextName),
    /// What the image has itself: the rest is that of the base.
    OfImage(&'a Arc<Image>),
}

impl Parts<'_> {
    fn extents(&self, source: &Source) -> Extents {
        match self {
            Self::All => source.extents(0),
            Self::Dirty(client, bitmap) => {
                let client = Client::clone(client);
                Extents::Dirty(Box::new(DirtyExtents::new(client, bitmap, 0)))
            }
            Self::OfImage(image) => Extents::TopOfImage(ImageExtents::new(image, 0)),
        }
    }
}

/// A disk of a backup.
pub(super) struct Disk<'a> {
    /// Its name, if there are several.
    pub(super) name: Option<String>,
    pub(super) source: Arc<Source>,
    pub(super) parts: Parts<'a>,
    /// Where it begins in the backup, in bytes.
    pub(super) start: u64,
}

impl Disk<'_> {
    fn size(&self) -> u64 {
        self.source.size().unwrap_or_default()
    }

    /// Gives data to the session. Only the end of the backup, which is at `total`, is not a whole
    /// block.
    async fn give(&self, session: &mut Session, bytes: Bytes, total: u64) -> Result<(), JobError> {
        let rest = (bytes.len() as u64).next_multiple_of(BLOCK_SIZE);
        let is_whole = rest == bytes.len() as u64;
        if is_whole || session.position() + bytes.len() as u64 == total {
            return session.data(bytes).await.map_err(repository_error);
        }
        let mut padded = bytes.to_vec();
        padded.resize(rest as usize, 0);
        session.data(padded.into()).await.map_err(repository_error)
    }
}

/// Shared state of the parts of one backup.
pub(super) struct Work<'a> {
    pub(super) repository: &'a Repository,
    pub(super) options: &'a RepositoryOptions,
    pub(super) context: &'a JobContext,
    pub(super) like: Vec<Id>,
    /// The backup on which this one is built.
    pub(super) base: Option<Id>,
    /// The size of its disk, if that has to be the same for the bitmap.
    pub(super) base_size: Option<u64>,
    /// The base, if it has to be the last one of its name still when the backup is committed.
    pub(super) follows: Option<Id>,
    /// Checks, when all was read, that the disk is the same still. Blocks.
    pub(super) before_commit: Option<BeforeCommit>,
}

pub(super) type BeforeCommit = Arc<dyn Fn() -> Result<(), JobError> + Send + Sync>;

/// Reads in order, several at a time.
enum Step {
    Data(Read),
    Zero(u64),
    Unchanged(u64),
}

/// A read that ends with its owner.
struct Read(JoinHandle<Result<Bytes, JobError>>);

impl Drop for Read {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Work<'_> {
    /// Backs up an export. With a bitmap, only its dirty parts are read.
    pub(super) async fn run_served(
        &self,
        uri: &NbdUri,
        dirty: Option<&str>,
        described: &Described,
    ) -> Result<BackedUpToRepository, JobError> {
        let (connect, context) = (&self.options.connect, self.context);
        let mut wanted = dirty.map(context_of).transpose()?;
        let client = connect_to_disk(connect, context, uri, wanted.as_ref()).await?;
        let source = Source::Nbd { client: client.clone(), uri: uri.clone() };
        let before = self.base_size.filter(|&before| Some(before) != source.size());
        if let Some(before) = before.filter(|_| wanted.is_some()) {
            self.reads_all(&format!(
                "the disk has {} bytes, and {before} in the last backup, so its bitmap does not tell \
                 what changed",
                source.size().unwrap_or_default(),
            ));
            wanted = None;
        }
        let parts = wanted.as_ref().map_or(Parts::All, |bitmap| Parts::Dirty(&client, bitmap));
        let result = self.run(source, parts, described).await;
        // Everything was read, so the way in which the connection ends does not matter.
        let _ = client.disconnect().await;
        result
    }

    /// Tells why a bitmap is not used.
    pub(super) fn reads_all(&self, why: &str) {
        self.context.observer.warning(&format!("{why}, so the whole disk is read"));
    }

    pub(super) async fn run(
        &self,
        source: Source,
        parts: Parts<'_>,
        described: &Described,
    ) -> Result<BackedUpToRepository, JobError> {
        let mut new = NewBackup::new(self.options.name.clone());
        new.size = source.size().unwrap_or_default();
        new.origin = described.origin.clone();
        if let Some((time, what)) = &described.imported {
            (new.time, new.imported) = (Some(*time), Some(what.clone()));
        }
        let disk = Disk { name: None, source: Arc::new(source), parts, start: 0 };
        self.run_all(&[disk], new).await
    }

    /// Backs up the disks of a backup, each of which begins where it says.
    pub(super) async fn run_all(
        &self,
        disks: &[Disk<'_>],
        mut new: NewBackup,
    ) -> Result<BackedUpToRepository, JobError> {
        let started = Instant::now();
        let is_dirty = |disk: &Disk<'_>| matches!(disk.parts, Parts::Dirty(..));
        let size = new.size;
        new.host = host_name();
        new.base = self.base;
        new.follows = self.follows.filter(|_| disks.iter().any(is_dirty));
        new.like.clone_from(&self.like);
        let mut session = self.repository.begin(new).await.map_err(repository_error)?;
        let copying = self.copy(disks, &mut session, size);
        let copied = self.context.cancellation.unless_cancelled(copying).await;
        if copied.is_err() {
            session.give_up().await;
        }
        let (made, read) = copied?;
        let mut verified = None;
        for disk in disks {
            let extents = match self.options.verify {
                Verify::Nothing => break,
                Verify::Copied => disk.parts.extents(&disk.source),
                Verify::All => disk.source.extents(0),
            };
            let compared = self.verify(disk, extents, &made).await?;
            verified = Some(verified.unwrap_or(0) + compared);
        }
        Ok(BackedUpToRepository {
            id: made.id,
            base: self.base,
            is_incremental: !disks.iter().any(|disk| matches!(disk.parts, Parts::All)),
            size: disks.iter().map(Disk::size).sum(),
            read,
            added: made.added,
            verified,
            took: started.elapsed(),
        })
    }

    /// Gives all disks to the session and commits it; returns the bytes that were read, too.
    async fn copy(
        &self,
        disks: &[Disk<'_>],
        session: &mut Session,
        size: u64,
    ) -> Result<(Made, u64), JobError> {
        let total = disks.iter().map(Disk::size).sum();
        let (phase, total) = (Phase::Copying, Some(total));
        let (mut read, mut progress) = (0, Progress { phase, done: 0, holes: 0, total });
        for disk in disks {
            let gap = disk.start.saturating_sub(session.position()) / BLOCK_SIZE;
            if gap > 0 {
                session.zero(gap).await.map_err(repository_error)?;
            }
            read += self.copy_disk(disk, session, (&mut progress, size)).await?;
        }
        if let Some(check) = self.before_commit.clone() {
            let checked = tasks::spawn_blocking(move || check()).await;
            checked.map_err(|error| JobError::given_up("read", &error))??;
        }
        let made = session.commit().await.map_err(repository_error)?;
        Ok((made, read))
    }

    /// Gives a disk to the session; returns the bytes that were read.
    async fn copy_disk(
        &self,
        disk: &Disk<'_>,
        session: &mut Session,
        (progress, total): (&mut Progress, u64),
    ) -> Result<u64, JobError> {
        let source = &disk.source;
        let longest = Lengths { data: READ, zeroes: KNOWN };
        let extents = disk.parts.extents(source);
        let plan = SharedPlan::new(Plan::new(0, disk.size(), BLOCK_SIZE, longest, extents));
        // Memory that is used again stays warm, and in one piece.
        let memory = ReadMemory::new(self.options.requests.get());
        let mut steps = VecDeque::new();
        let (mut read, before) = (0, progress.done);
        loop {
            while steps.len() < self.options.requests.get() {
                let Some(range) = plan.next(|_| {}).await? else { break };
                let blocks = range.length.div_ceil(BLOCK_SIZE);
                steps.push_back(match range.content {
                    Content::Zero => Step::Zero(blocks),
                    Content::Unchanged => Step::Unchanged(blocks),
                    Content::Data => {
                        self.context.keep_rate(range.length).await;
                        read += range.length;
                        Step::Data(begin(source, range.offset, range.length, memory.take_used()))
                    }
                });
            }
            match steps.pop_front() {
                None => return Ok(read),
                Some(Step::Zero(blocks)) => {
                    progress.holes += blocks * BLOCK_SIZE;
                    session.zero(blocks).await.map_err(repository_error)?;
                }
                Some(Step::Data(mut reading)) => {
                    let bytes = ended(&mut reading).await?;
                    disk.give(session, bytes, total).await?;
                    while let Some(spent) = session.take_spent() {
                        memory.give_back(spent);
                    }
                }
                Some(Step::Unchanged(blocks)) => {
                    read += self.unchanged(disk, session, (blocks, total)).await?;
                }
            }
            let given = (session.position() - disk.start).min(disk.size());
            progress.done = before + given;
            self.context.observer.progress(progress);
        }
    }

    /// Gives blocks that are clean. Those that the repository does not have any more are read;
    /// returns their bytes.
    async fn unchanged(
        &self,
        disk: &Disk<'_>,
        session: &mut Session,
        (blocks, total): (u64, u64),
    ) -> Result<u64, JobError> {
        let end = (session.position() + blocks * BLOCK_SIZE).min(disk.start + disk.size());
        let mut read = 0;
        while session.position() < end {
            let left = (end - session.position()).div_ceil(BLOCK_SIZE);
            let taken = session.unchanged(left).await.map_err(repository_error)?;
            if taken < left {
                let start = session.position();
                let length = READ.min(end - start);
                let start_of_read = start - disk.start;
                let mut reading = begin(&disk.source, start_of_read, length, BytesMut::new());
                disk.give(session, ended(&mut reading).await?, total).await?;
                read += length;
            }
        }
        Ok(read)
    }

    /// Reads the backup back. One that is not what it should be is forgotten.
    async fn verify(
        &self,
        disk: &Disk<'_>,
        extents: Extents,
        made: &Made,
    ) -> Result<u64, JobError> {
        let opened = self.repository.read_disk(made.id, disk.name.as_deref(), Damage::Refused);
        let opened = opened.await;
        let opened = Arc::new(opened.map_err(repository_error)?);
        let result = self.compare(&disk.source, extents, Arc::clone(&opened) as _).await;
        // Reads that were given up may still hold it.
        opened.close().await;
        match result {
            Err(error) if error.kind() == JobErrorKind::Mismatch => {
                let forgotten = self.repository.forget(made.id, true).await;
                let left = match forgotten {
                    Ok(_) => "it was forgotten again".to_owned(),
                    Err(second) => format!("and could not be forgotten: {second}"),
                };
                Err(error.in_words(format!(
                    "the backup {} is not as it should be: {error}; {left}",
                    made.id
                )))
            }
            result => result,
        }
    }

    async fn compare(
        &self,
        source: &Source,
        extents: Extents,
        storage: Arc<dyn Storage>,
    ) -> Result<u64, JobError> {
        let raw = OpenOptions::new().format(Format::Raw);
        let image = tasks::spawn_blocking(move || Image::from_storage(storage, &raw)).await;
        let image = image.map_err(|error| JobError::given_up("read", &error))?;
        let image = image.map_err(|error| JobError::image(JobErrorKind::Destination, error))?;
        let copy = Source::image(Arc::new(image));
        let unit = source.alignment().max(4096);
        let verification =
            Arc::new(Verification::new(source.clone(), copy, unit, extents, self.context));
        verification.run(self.options.requests.get()).await
    }
}

fn begin(source: &Arc<Source>, offset: u64, length: u64, memory: BytesMut) -> Read {
    let source = Arc::clone(source);
    let read = async move { source.read(offset, length, memory).await };
    Read(tasks::spawn(read))
}

async fn ended(read: &mut Read) -> Result<Bytes, JobError> {
    (&mut read.0).await.map_err(|error| JobError::given_up("read", &error))?
}
