//! A copy: both sides, the remaining work, and the copying of one range.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex as SyncMutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use imgfmt::zero::{Content as RunContent, runs};
use nbd_client::{ReadMemory, ZeroMode};

use super::content::Content;
use super::crew::Crew;
use super::destination::Destination;
use super::holes::{WriteSpan, write_spans};
use super::options::{CopyOptions, Zeroes};
use super::plan::{Extents, Lengths, Plan, PlannedRange};
use super::shared_plan::SharedPlan;
use super::source::Source;
use super::sum::{InOrder, Sum};
use crate::checksum::Checksum;
use crate::error::JobError;
use crate::lanes::Lanes;
use crate::observer::{JobContext, Meter, Phase};

/// Zeroes are written in ranges of this size, so that progress is visible.
const MAX_ZERO_LENGTH: u64 = 256 << 20;

/// Between files, at least this much is copied at a time, in bytes: they have no requests, threads
/// that write into one file wait for each other, and larger writes cost the file system less.
const FILE_PIECE: u64 = 1 << 20;

/// Settings of a copy.
pub(crate) struct Settings {
    /// Requests in flight.
    pub(crate) requests: usize,
    /// Longest request, in bytes; a power of two of at most 32 MiB.
    pub(crate) request_size: u64,
    /// Alignment of ranges: a power of two, in bytes.
    pub(crate) unit: u64,
    pub(crate) zeroes: ZeroPolicy,
    /// Unit of zero detection in data, in bytes; none if it is off.
    pub(crate) sparse: Option<u64>,
    /// Bytes copied before, from the start of the disk.
    pub(crate) start: u64,
    /// The threads that copy.
    pub(crate) lanes: Lanes,
    /// The sum of what is read, if it is wanted.
    pub(crate) sum: Option<Sum>,
}

/// The treatment of zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ZeroPolicy {
    /// Skipped: the destination is zero already.
    Skip,
    Write(ZeroMode),
}

/// Shared state of all tasks of one copy.
pub(crate) struct Job {
    pub(crate) source: Source,
    pub(crate) destination: Destination,
    pub(super) context: JobContext,
    pub(super) lanes: Lanes,
    pub(super) meter: Meter,
    pub(super) requests: usize,
    pub(super) request_size: usize,
    /// Request limits of both sides.
    pub(super) alignment: u64,
    zeroes: ZeroPolicy,
    /// Alignment and largest size of ranges.
    cut: (u64, Lengths),
    /// Unit of zero detection in data, if it is on.
    sparse: Option<usize>,
    /// Unit of writing holes that the source reports, in bytes.
    hole_unit: u64,
    plan: SharedPlan,
    /// The offsets of the ranges in work.
    begun: SyncMutex<BTreeSet<u64>>,
    counts: Counts,
    /// The sum of what is read.
    pub(crate) sum: Option<Sum>,
}

/// Bytes copied, by kind.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Read and written, including data that turned out to be zero.
    pub(crate) data: AtomicU64,
    /// Known to be zero.
    pub(crate) zero: AtomicU64,
    /// Already in the destination.
    pub(crate) unchanged: AtomicU64,
}

impl Settings {
    /// Applies the options of a copy.
    pub(super) fn of_copy(
        options: &CopyOptions,
        lanes: &Lanes,
        source: &Source,
        destination: &Destination,
    ) -> Result<Self, JobError> {
        let unit = source.alignment().max(destination.alignment());
        let zeroes = match options.zeroes {
            Zeroes::Allocate => ZeroPolicy::Write(ZeroMode::KeepAllocated),
            Zeroes::Skip => ZeroPolicy::Skip,
            Zeroes::PunchHoles if destination.is_zero() => ZeroPolicy::Skip,
            Zeroes::PunchHoles => ZeroPolicy::Write(ZeroMode::MayUnmap),
        };
        // Where everything is allocated, separating zeroes from data gains nothing.
        let looks = options.zeroes != Zeroes::Allocate && !matches!(destination, Destination::Null);
        let sparse = options.sparse.filter(|_| looks).map(|sparse| sparse.max(unit));
        let (mut requests, mut request_size) = (options.requests.get(), options.request_size);
        let is_local = match source {
            Source::File { .. } => matches!(destination, Destination::File { .. }),
            // Its blocks are fetched by other requests: each of these only wakes threads.
            Source::Image { .. } => {
                matches!(destination, Destination::File { .. } | Destination::Null)
            }
            _ => false,
        };
        if is_local && request_size < FILE_PIECE {
            // The same memory.
            let larger = FILE_PIECE / request_size.max(1);
            requests = requests.div_ceil(usize::try_from(larger).unwrap_or(usize::MAX));
            request_size = FILE_PIECE;
        }
        let lanes = lanes.clone();
        let algorithm = options.expected.as_ref().map(Checksum::algorithm).or(options.checksum);
        let sum = algorithm.map(InOrder::new).transpose()?.map(Sum::InOrder);
        Ok(Self { requests, request_size, unit, zeroes, sparse, start: 0, lanes, sum })
    }
}

impl Job {
    pub(crate) fn new(
        settings: Settings,
        source: Source,
        destination: Destination,
        extents: Extents,
        context: &JobContext,
    ) -> Self {
        let alignment = source.alignment().max(destination.alignment());
        // Both limits keep the sizes within 32 MiB.
        let request_size = settings.request_size.max(settings.unit) as usize;
        let sparse = settings.sparse.map(|unit| usize::try_from(unit).unwrap_or(usize::MAX));
        let meter = Meter::begin(context, Phase::Copying, source.size(), settings.start);
        let size = source.size().unwrap_or_default();
        let longest_zeroes = match settings.zeroes {
            ZeroPolicy::Skip => u64::MAX,
            ZeroPolicy::Write(_) => MAX_ZERO_LENGTH,
        };
        let longest = Lengths { data: request_size as u64, zeroes: longest_zeroes };
        let plan = Plan::new(settings.start, size, settings.unit, longest, extents);
        Self {
            source,
            destination,
            context: context.clone(),
            lanes: settings.lanes,
            meter,
            requests: settings.requests,
            request_size,
            alignment,
            zeroes: settings.zeroes,
            cut: (settings.unit, longest),
            sparse,
            // Smaller ones are not worth a separate request.
            hole_unit: settings.sparse.unwrap_or(settings.unit),
            plan: SharedPlan::new(plan),
            begun: SyncMutex::default(),
            counts: Counts::default(),
            sum: settings.sum,
        }
    }

    /// The next range of the disk.
    pub(super) async fn next_range(&self) -> Result<Option<PlannedRange>, JobError> {
        // While the plan is locked, so that `done` never sees a gap.
        let begin = |range: &PlannedRange| {
            self.begun().insert(range.offset);
        };
        self.plan.next(begin).await
    }

    /// Returns the position up to which the destination has received everything, in bytes from the
    /// start.
    pub(crate) fn done(&self) -> u64 {
        let plan = self.plan.lock();
        let first = self.begun().first().copied();
        first.unwrap_or_else(|| plan.position())
    }

    /// Restarts the copy at `position` (in bytes), after everything was copied once; returns where
    /// it begins: at 0 if there is a sum of the bytes in their order.
    pub(super) async fn begin_again(&self, position: u64) -> Result<u64, JobError> {
        let position = match &self.sum {
            Some(sum) => sum.begin_again(position).await?,
            None => position,
        };
        let size = self.source.size().unwrap_or_default();
        let (unit, longest) = self.cut;
        let extents = self.source.extents(position);
        *self.plan.lock() = Plan::new(position, size, unit, longest, extents);
        self.begun().clear();
        self.meter.set_back(size.saturating_sub(position));
        Ok(position)
    }

    pub(crate) fn counts(&self) -> &Counts {
        &self.counts
    }

    fn begun(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes data, and skips or punches the zeroes in it.
    pub(super) async fn store(&self, offset: u64, data: &Bytes) -> Result<(), JobError> {
        let Some(unit) = self.sparse else {
            return self.destination.write(offset, data.clone()).await;
        };
        for run in runs(data, unit) {
            let at = offset + run.start as u64;
            match run.content {
                RunContent::Data => {
                    self.destination.write(at, data.slice(run.start..run.end)).await?;
                }
                RunContent::Zero => self.store_zeroes(at, (run.end - run.start) as u64).await?,
            }
        }
        Ok(())
    }

    /// Makes a range zero.
    pub(super) async fn store_zeroes(&self, offset: u64, length: u64) -> Result<(), JobError> {
        match self.zeroes {
            ZeroPolicy::Skip => Ok(()),
            ZeroPolicy::Write(mode) => self.destination.write_zeroes(offset, length, mode).await,
        }
    }

    /// Takes data of a layer into the sum, if there is one.
    pub(super) async fn sum_data(
        &self,
        offset: u64,
        data: &Bytes,
        depth: u32,
    ) -> Result<(), JobError> {
        match &self.sum {
            Some(sum) => sum.data(offset, data, depth).await,
            None => Ok(()),
        }
    }

    /// Takes a range of zeroes into the sum, if there is one.
    pub(super) async fn sum_zeroes(&self, offset: u64, length: u64) -> Result<(), JobError> {
        match &self.sum {
            Some(sum) => sum.zeroes(offset, length).await,
            None => Ok(()),
        }
    }

    /// Reads and writes a range, through memory of earlier ones; returns the number of bytes that
    /// turned out to be a hole.
    async fn copy_data(&self, range: &PlannedRange, memory: &ReadMemory) -> Result<u64, JobError> {
        self.context.keep_rate(range.length).await;
        let read = self.source.read_chunks(range.offset, range.length, memory).await?;
        let mut holes = 0;
        for part in write_spans(read, self.hole_unit) {
            match part {
                WriteSpan::Data { offset, data } => {
                    self.sum_data(offset, &data, range.depth).await?;
                    self.store(offset, &data).await?;
                    self.counts.data.fetch_add(data.len() as u64, Ordering::Relaxed);
                    memory.give_back(data);
                }
                // The server reported it in the answer to a read.
                WriteSpan::Zero { offset, length } => {
                    self.sum_zeroes(offset, length).await?;
                    self.store_zeroes(offset, length).await?;
                    self.counts.zero.fetch_add(length, Ordering::Relaxed);
                    holes += length;
                }
            }
        }
        Ok(holes)
    }

    /// Copies ranges until none is left.
    pub(super) async fn copy_pieces(&self, crew: &Crew) -> Result<(), JobError> {
        while let Some(range) = self.next_range().await? {
            let begun = Instant::now();
            let holes = match range.content {
                Content::Data => self.copy_data(&range, &crew.memory).await?,
                Content::Zero => {
                    self.sum_zeroes(range.offset, range.length).await?;
                    self.store_zeroes(range.offset, range.length).await?;
                    self.counts.zero.fetch_add(range.length, Ordering::Relaxed);
                    range.length
                }
                Content::Unchanged => {
                    self.counts.unchanged.fetch_add(range.length, Ordering::Relaxed);
                    0
                }
            };
            self.begun().remove(&range.offset);
            self.meter.add(range.length, holes);
            crew.copied_in(begun.elapsed());
        }
        crew.end();
        Ok(())
    }
}
