//! One backup: copies the disk into a growing file, verifies it on request, and seals it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use imgfmt::{Access, BackupIdentity, ContentSum, Uuid};
use nbd_client::{Client, ZeroMode};
use nbd_proto::NbdUri;
use nbd_proto::wire::{MetaContextName, TransmissionFlags};

use super::chain::Base;
use super::options::{BackupJob, BackupSource, CLUSTER_SIZE};
use super::partial::{self, Partial, State};
use crate::connect::{ConnectOptions, connect};
use crate::copy::destination::{Background, Destination};
use crate::copy::dirty::DirtyExtents;
use crate::copy::engine;
use crate::copy::job::{Job, Settings, ZeroPolicy};
use crate::copy::plan::Extents;
use crate::copy::source::Source;
use crate::copy::sum::{OfLayers, Sum};
use crate::copy::verify::Verification;
use crate::error::{JobError, JobErrorKind};
use crate::layers;
use crate::observer::JobContext;
use crate::restore::Verify;
use crate::tasks;
use crate::text::printable;

/// Size of a request, in bytes.
const REQUEST_SIZE: u64 = 512 << 10;
/// Interval at which the progress of a backup is made durable.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);

/// The result of a backup. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackedUp {
    /// The copied export: the disk, or the view of the checkpoint.
    pub uri: NbdUri,
    /// Size of the disk.
    pub size: u64,
    /// Start of this run; above 0 if it resumed an earlier one.
    pub resumed_at: u64,
    /// Bytes read and written.
    pub copied: u64,
    /// Bytes known to be zero.
    pub zero: u64,
    /// Bytes already in the base.
    pub unchanged: u64,
    /// Bytes compared, if the backup was verified.
    pub verified: Option<u64>,
    /// Duration of the copy.
    pub took: Duration,
}

/// What was copied into the partial file.
struct Filled {
    /// Bytes copied, by kind.
    counts: [u64; 3],
    /// The start of the copy, in bytes.
    start: u64,
    /// The sum of the blocks that the file holds, as it is recorded.
    content: Option<ContentSum>,
}

/// The identities of the backup and of its disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Issued {
    pub(crate) backup: Uuid,
    pub(crate) disk: Option<Uuid>,
}

impl Issued {
    /// New identities, where none are given.
    pub(super) fn ours() -> Result<Self, JobError> {
        let backup = Uuid::random().map_err(|error| {
            JobError::new(
                JobErrorKind::Internal,
                format!("the system gives no random numbers: {error}"),
            )
        })?;
        Ok(Self { backup, disk: None })
    }
}

/// Copies the disk at `uri`.
pub(super) async fn run(
    work: BackupJob<'_>,
    uri: &NbdUri,
    base: Option<&Base>,
    issued: Issued,
) -> Result<BackedUp, JobError> {
    let started = Instant::now();
    // Without a base everything is copied, regardless of the bitmap.
    let options = work.options;
    let bitmap =
        options.base.as_ref().and(options.bitmap.as_deref()).map(context_of).transpose()?;
    let client = connect_to_disk(&options.connect, work.context, uri, bitmap.as_ref()).await?;
    let size = client.info().size;
    base.map_or(Ok(()), |base| base.check(size, work))?;
    let state = State::new(work, uri, size, base);
    let mut partial = Partial::begin(work, state, base)?;
    let disk = (client.clone(), uri);
    let result = fill(work, disk, bitmap.as_ref(), &mut partial, issued.backup).await;
    let Filled { counts, start: resumed_at, content } = result.map_err(|error| {
        let error = error.in_words(format!("the backup of {uri} failed: {error}"));
        partial.failed(
            &error,
            match work.source {
                BackupSource::Export(_) => "add --resume to go on, if the disk does not change",
                BackupSource::Checkpoint { .. } => "begin again with --restart",
            },
        )
    })?;
    let disk = (&client, uri);
    let verified = match options.verify {
        Verify::Nothing => None,
        Verify::Copied => Some(verify(work, disk, bitmap.as_ref(), &partial).await?),
        Verify::All => Some(verify(work, disk, None, &partial).await?),
    };
    let mut identity = BackupIdentity::new(issued.backup, size);
    identity.base = base.map(Base::identity).unwrap_or_default();
    identity.disk = issued.disk;
    identity.bitmap.clone_from(&options.bitmap);
    identity.export = match work.source {
        BackupSource::Export(uri) => uri.export_name.clone(),
        BackupSource::Checkpoint { export, .. } => export.clone(),
    };
    identity.content = content;
    partial.complete(&identity, work)?;
    // Everything was read, so the way in which the connection ends does not matter.
    let _ = client.disconnect().await;
    let [copied, zero, unchanged] = counts;
    let (uri, took) = (uri.clone(), started.elapsed());
    Ok(BackedUp { uri, size, resumed_at, copied, zero, unchanged, verified, took })
}

pub(crate) fn context_of(bitmap: &str) -> Result<MetaContextName, JobError> {
    MetaContextName::qemu_dirty_bitmap(bitmap).map_err(|error| {
        JobError::invalid(format!(
            "'{}' is not a valid name of a bitmap: {error}",
            printable(bitmap)
        ))
    })
}

pub(crate) async fn connect_to_disk(
    options: &ConnectOptions,
    job: &JobContext,
    uri: &NbdUri,
    bitmap: Option<&MetaContextName>,
) -> Result<Client, JobError> {
    let contexts = [MetaContextName::base_allocation()].into_iter().chain(bitmap.cloned());
    let connector = options.connector(uri).meta_contexts(contexts);
    let cancellation = &job.cancellation;
    let client = connect(&connector, uri, JobErrorKind::Source, cancellation).await?;
    if let Some(context) = bitmap
        && !client.meta_contexts().contains(context)
    {
        let offered = connector.list_meta_contexts(&["qemu:dirty-bitmap:".to_owned()]).await;
        let offered = offered.unwrap_or_default();
        let names: Vec<_> = offered
            .iter()
            .filter_map(MetaContextName::dirty_bitmap)
            .take(8)
            .map(|name| format!("'{}'", printable(name)))
            .collect();
        let has = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        return Err(JobError::source(format!(
            "{uri} offers no dirty bitmap '{}' (it offers {has}); make a full backup, or have the \
             server export the bitmap",
            printable(context.dirty_bitmap().unwrap_or_default())
        )));
    }
    if !client.info().flags.contains(TransmissionFlags::READ_ONLY) {
        job.observer.warning(&format!(
            "{uri} can be written to: if that happens while it is copied, the backup is a mix of \
             old and new"
        ));
    }
    Ok(client)
}

/// Copies into the partial file.
async fn fill(
    work: BackupJob<'_>,
    (client, uri): (Client, &NbdUri),
    bitmap: Option<&MetaContextName>,
    partial: &mut Partial,
    backup: Uuid,
) -> Result<Filled, JobError> {
    let start = partial.done();
    let size = client.info().size;
    let source = Source::Nbd { client: client.clone(), uri: uri.clone() };
    let extents = extents(&client, bitmap, start);
    let background = if work.options.base.is_some() || start > 0 {
        Background::Unknown
    } else {
        Background::Zero
    };
    let image = partial.open(work, Access::ReadWrite)?;
    let mask = image.sum_mask(backup).map_err(partial::image_error)?;
    let destination = Destination::image(image, background);
    let zeroes = match background {
        Background::Zero => ZeroPolicy::Skip,
        // Zero clusters: holes would expose the layer below.
        Background::Unknown => ZeroPolicy::Write(ZeroMode::MayUnmap),
    };
    let settings = Settings {
        requests: work.options.requests.get(),
        request_size: REQUEST_SIZE,
        unit: CLUSTER_SIZE.max(source.alignment()),
        zeroes,
        sparse: Some(CLUSTER_SIZE),
        start,
        lanes: work.options.connect.lanes.clone(),
        sum: Some(Sum::OfLayers(OfLayers::new(size))),
    };
    let job = Arc::new(Job::new(settings, source, destination, extents, work.context));
    let result = run_and_save(&job, partial).await;
    // Saves the progress in any case; the first error is reported.
    let saved = save(&job, partial).await;
    result.and(saved)?;
    let counts = job.counts();
    let counts = [&counts.data, &counts.zero, &counts.unchanged].map(|n| n.load(Ordering::Relaxed));
    let job = Arc::into_inner(job).ok_or_else(|| {
        JobError::new(JobErrorKind::Internal, "a task of the backup has not ended")
    })?;
    job.destination.close_image()?;
    let mut content = match &job.sum {
        Some(Sum::OfLayers(sum)) => sum.of_layer(0),
        _ => None,
    };
    if let Some(content) = content.as_mut().filter(|_| start > 0) {
        content.add(earlier(work, partial, start).await?);
    }
    let content = content.map(|sum| mask.apply(sum));
    Ok(Filled { counts, start, content })
}

/// Returns the sum of the blocks below `start` (in bytes), which an interrupted backup has left:
/// the only ones that are read again.
async fn earlier(
    work: BackupJob<'_>,
    partial: &Partial,
    start: u64,
) -> Result<ContentSum, JobError> {
    let image = partial.open_alone(work)?;
    let context = work.context.clone();
    let sum = move || {
        layers::sum_of(&image, layers::disk(&image, start), |range| Ok(vec![range]), &context)
    };
    let summed = tasks::spawn_blocking(sum).await;
    summed.map_err(|error| JobError::given_up("read", &error))?
}

fn extents(client: &Client, bitmap: Option<&MetaContextName>, start: u64) -> Extents {
    let allocation = MetaContextName::base_allocation();
    match bitmap {
        Some(bitmap) => Extents::Dirty(Box::new(DirtyExtents::new(client.clone(), bitmap, start))),
        None if client.meta_contexts().contains(&allocation) => {
            Extents::Server(client.extents(&allocation, start..client.info().size))
        }
        None => Extents::Unknown,
    }
}

async fn run_and_save(job: &Arc<Job>, partial: &mut Partial) -> Result<(), JobError> {
    let mut running = std::pin::pin!(engine::run(job));
    loop {
        tokio::select! {
            result = &mut running => return result,
            () = tokio::time::sleep(SAVE_INTERVAL) => save(job, partial).await?,
        }
    }
}

/// Makes progress durable: flushes the data, then records the position.
async fn save(job: &Job, partial: &mut Partial) -> Result<(), JobError> {
    let done = job.done();
    job.destination.finish(true).await?;
    partial.save(done)
}

/// Verifies the copied ranges, by the dirty bits of `bitmap`, or everything.
async fn verify(
    work: BackupJob<'_>,
    (client, uri): (&Client, &NbdUri),
    bitmap: Option<&MetaContextName>,
    partial: &Partial,
) -> Result<u64, JobError> {
    let image = partial.open(work, Access::ReadOnly)?;
    let source = Source::Nbd { client: client.clone(), uri: uri.clone() };
    let unit = source.alignment();
    let extents = extents(client, bitmap, 0);
    let copy = Source::image(Arc::new(image));
    let verification = Arc::new(Verification::new(source, copy, unit, extents, work.context));
    let result = verification.run(work.options.requests.get()).await;
    result.map_err(|error| {
        let error = error.in_words(format!("the backup is not as it should be: {error}"));
        partial.failed(&error, "begin again with --restart")
    })
}
