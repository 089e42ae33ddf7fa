//! A copy: both sides, what is still to be done, and how one piece is copied.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex as SyncMutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use imgfmt::zero::{Content as RunContent, runs};
use nbd_client::ZeroMode;
use tokio::sync::Mutex;

use super::content::Content;
use super::destination::Destination;
use super::holes::{Part, parts};
use super::options::{CopyOptions, Zeroes};
use super::plan::{Extents, Lengths, Piece, Plan};
use super::source::Source;
use crate::observer::Meter;
use crate::{JobContext, JobError, Phase};

/// Zeroes are written in pieces of this size, so that progress shows.
const MAX_ZERO_LENGTH: u64 = 256 << 20;

/// How a copy is carried out.
pub(crate) struct Settings {
    /// Requests in flight.
    pub(crate) requests: usize,
    /// Longest request, in bytes; a power of two of at most 32 MiB.
    pub(crate) request_size: u64,
    /// Where pieces are cut: a power of two, in bytes.
    pub(crate) unit: u64,
    pub(crate) zeroes: ZeroPolicy,
    /// Unit in which zeroes are looked for in data, if they are, in bytes.
    pub(crate) sparse: Option<u64>,
    /// What was copied before, in bytes from the start of the disk.
    pub(crate) start: u64,
}

/// What becomes of zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ZeroPolicy {
    /// The destination is zero already.
    Skip,
    Write(ZeroMode),
}

/// What all tasks of one copy share.
pub(crate) struct Job {
    pub(crate) source: Source,
    pub(crate) destination: Destination,
    pub(super) context: JobContext,
    pub(super) meter: Meter,
    pub(super) requests: usize,
    pub(super) request_size: usize,
    /// What both sides need of requests.
    pub(super) alignment: u64,
    zeroes: ZeroPolicy,
    /// Where pieces are cut, and how long they may be.
    cut: (u64, Lengths),
    /// Unit in which zeroes are looked for, if they are.
    sparse: Option<usize>,
    /// Unit in which holes that the source tells of are written, in bytes.
    hole_unit: u64,
    plan: Mutex<Plan>,
    /// The offsets of the pieces that tasks are busy with.
    begun: SyncMutex<BTreeSet<u64>>,
    counts: Counts,
}

/// How much was copied and how, in bytes.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Read and written; data that turned out to be zero included.
    pub(crate) data: AtomicU64,
    /// Known to be zero.
    pub(crate) zero: AtomicU64,
    /// In the destination already.
    pub(crate) unchanged: AtomicU64,
}

impl Settings {
    /// What the options of a copy ask for.
    pub(super) fn of_copy(
        options: &CopyOptions,
        source: &Source,
        destination: &Destination,
    ) -> Self {
        let unit = source.alignment().max(destination.alignment());
        let zeroes = match options.zeroes {
            Zeroes::Allocate => ZeroPolicy::Write(ZeroMode::NoHole),
            Zeroes::Skip => ZeroPolicy::Skip,
            Zeroes::PunchHoles if destination.is_zero() => ZeroPolicy::Skip,
            Zeroes::PunchHoles => ZeroPolicy::Write(ZeroMode::MayPunch),
        };
        // Where everything is allocated nothing is gained by telling zeroes from data.
        let looks = options.zeroes != Zeroes::Allocate && !matches!(destination, Destination::Null);
        let sparse = options.sparse.filter(|_| looks).map(|sparse| sparse.max(unit));
        let (requests, request_size) = (options.requests.get(), options.request_size);
        Self { requests, request_size, unit, zeroes, sparse, start: 0 }
    }
}

impl Job {
    pub(crate) fn new(
        settings: &Settings,
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
        let plan = Mutex::new(Plan::new(settings.start, size, settings.unit, longest, extents));
        Self {
            source,
            destination,
            context: context.clone(),
            meter,
            requests: settings.requests,
            request_size,
            alignment,
            zeroes: settings.zeroes,
            cut: (settings.unit, longest),
            sparse,
            // Smaller ones are not worth a request of their own.
            hole_unit: settings.sparse.unwrap_or(settings.unit),
            plan,
            begun: SyncMutex::default(),
            counts: Counts::default(),
        }
    }

    /// The next piece of the disk.
    pub(super) async fn next_piece(&self) -> Result<Option<Piece>, JobError> {
        let mut plan = self.plan.lock().await;
        let piece = plan.next().await?;
        if let Some(piece) = &piece {
            // While the plan is locked, so that `done` never sees a gap.
            self.begun().insert(piece.offset);
        }
        Ok(piece)
    }

    /// Up to where everything has been handed to the destination, in bytes from the start.
    pub(crate) async fn done(&self) -> u64 {
        let plan = self.plan.lock().await;
        let first = self.begun().first().copied();
        first.unwrap_or_else(|| plan.position())
    }

    /// Begins the copy anew at `position` (in bytes), after everything was copied once.
    pub(super) async fn begin_again(&self, position: u64) {
        let size = self.source.size().unwrap_or_default();
        let (unit, longest) = self.cut;
        let extents = self.source.extents(position);
        *self.plan.lock().await = Plan::new(position, size, unit, longest, extents);
        self.begun().clear();
        self.meter.set_back(size.saturating_sub(position));
    }

    pub(crate) fn counts(&self) -> &Counts {
        &self.counts
    }

    fn begun(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes data, leaving out or punching the zeroes in it.
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

    /// Makes sure that a range is zero.
    pub(super) async fn store_zeroes(&self, offset: u64, length: u64) -> Result<(), JobError> {
        match self.zeroes {
            ZeroPolicy::Skip => Ok(()),
            ZeroPolicy::Write(mode) => self.destination.write_zeroes(offset, length, mode).await,
        }
    }

    /// Reads and writes a piece; the number of bytes that turned out to be a hole. Takes memory that is
    /// left over from an earlier one, and leaves some: fresh memory would cost page faults for
    /// every piece.
    async fn copy_data(&self, piece: &Piece, buffer: &mut BytesMut) -> Result<u64, JobError> {
        let memory = std::mem::take(buffer);
        let read = self.source.read_chunks(piece.offset, piece.length, memory).await?;
        let mut holes = 0;
        for part in parts(read, self.hole_unit) {
            match part {
                Part::Data { offset, data } => {
                    self.store(offset, &data).await?;
                    self.counts.data.fetch_add(data.len() as u64, Ordering::Relaxed);
                    *buffer = data.try_into_mut().unwrap_or_default();
                }
                // The server has said so while it was asked for data.
                Part::Zero { offset, length } => {
                    self.store_zeroes(offset, length).await?;
                    self.counts.zero.fetch_add(length, Ordering::Relaxed);
                    holes += length;
                }
            }
        }
        Ok(holes)
    }

    /// Copies one piece after the other until none is left.
    pub(super) async fn copy_pieces(&self) -> Result<(), JobError> {
        let mut buffer = BytesMut::new();
        while let Some(piece) = self.next_piece().await? {
            let holes = match piece.content {
                Content::Data => self.copy_data(&piece, &mut buffer).await?,
                Content::Zero => {
                    self.store_zeroes(piece.offset, piece.length).await?;
                    self.counts.zero.fetch_add(piece.length, Ordering::Relaxed);
                    piece.length
                }
                Content::Unchanged => {
                    self.counts.unchanged.fetch_add(piece.length, Ordering::Relaxed);
                    0
                }
            };
            self.begun().remove(&piece.offset);
            self.meter.add(piece.length, holes);
        }
        Ok(())
    }
}
