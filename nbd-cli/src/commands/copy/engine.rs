//! Many tasks that copy pieces of the disk at the same time.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use nbd_client::ZeroMode;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use super::CopyArgs;
use super::destination::Destination;
use super::plan::{Lengths, Piece, Plan};
use super::source::Source;
use super::stream;
use super::zero::{Content, runs};
use crate::error::CommandError;
use crate::progress::Progress;
use crate::size::exact;

/// Zeroes are written in pieces of this size, so that progress shows.
const MAX_ZERO_LENGTH: u64 = 256 << 20;

/// What all tasks of one copy share.
pub(super) struct Job {
    pub(super) source: Source,
    pub(super) destination: Destination,
    pub(super) progress: Progress,
    pub(super) requests: usize,
    pub(super) request_size: usize,
    alignment: u64,
    zeroes: ZeroPolicy,
    /// Unit in which zeroes are looked for, if they are.
    sparse: Option<usize>,
    plan: Mutex<Plan>,
}

/// What becomes of zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ZeroPolicy {
    /// The destination is zero already.
    Skip,
    Write(ZeroMode),
}

impl Job {
    pub(super) fn new(
        args: &CopyArgs,
        source: Source,
        destination: Destination,
        progress: Progress,
    ) -> Self {
        let alignment = source.alignment().max(destination.alignment());
        // Both limits keep the sizes within 32 MiB.
        let request_size = args.request_size.bytes().max(alignment) as usize;
        let zeroes = if args.allocated {
            ZeroPolicy::Write(ZeroMode::NoHole)
        } else if args.destination_is_zero || destination.is_zero() {
            ZeroPolicy::Skip
        } else {
            ZeroPolicy::Write(ZeroMode::MayPunch)
        };
        let sparse = match args.sparse.bytes().max(alignment) {
            // With --allocated nothing is gained by telling zeroes from data.
            _ if args.sparse.bytes() == 0 || args.allocated => None,
            _ if matches!(destination, Destination::Null) => None,
            unit => Some(usize::try_from(unit).unwrap_or(usize::MAX)),
        };
        let size = source.size().unwrap_or_default();
        let extents = source.extents(args);
        let longest_zeroes = match zeroes {
            ZeroPolicy::Skip => u64::MAX,
            ZeroPolicy::Write(_) => MAX_ZERO_LENGTH,
        };
        let longest = Lengths { data: request_size as u64, zeroes: longest_zeroes };
        let plan = Mutex::new(Plan::new(size, alignment, longest, extents));
        let requests = args.requests.get();
        Self {
            source,
            destination,
            progress,
            requests,
            request_size,
            alignment,
            zeroes,
            sparse,
            plan,
        }
    }

    /// The next piece of the disk.
    pub(super) async fn next_piece(&self) -> Result<Option<Piece>, CommandError> {
        self.plan.lock().await.next().await
    }

    /// Writes data, leaving out or punching the zeroes in it.
    pub(super) async fn store(&self, offset: u64, data: &Bytes) -> Result<(), CommandError> {
        let Some(unit) = self.sparse else {
            return self.destination.write(offset, data.clone()).await;
        };
        for run in runs(data, unit) {
            let at = offset + run.start as u64;
            match run.content {
                Content::Data => {
                    self.destination.write(at, data.slice(run.start..run.end)).await?;
                }
                Content::Zero => self.store_zeroes(at, (run.end - run.start) as u64).await?,
            }
        }
        Ok(())
    }

    /// Makes sure that a range is zero.
    pub(super) async fn store_zeroes(&self, offset: u64, length: u64) -> Result<(), CommandError> {
        match self.zeroes {
            ZeroPolicy::Skip => Ok(()),
            ZeroPolicy::Write(mode) => self.destination.write_zeroes(offset, length, mode).await,
        }
    }

    async fn copy_pieces(&self) -> Result<(), CommandError> {
        let mut buffer = BytesMut::new();
        while let Some(piece) = self.next_piece().await? {
            match piece.content {
                Content::Data => {
                    let data = self.source.read(piece.offset, piece.length, buffer).await?;
                    self.store(piece.offset, &data).await?;
                    // Fresh memory would cost page faults for every piece.
                    buffer = data.try_into_mut().unwrap_or_default();
                }
                Content::Zero => self.store_zeroes(piece.offset, piece.length).await?,
            }
            self.progress.add(piece.length);
        }
        Ok(())
    }
}

/// Copies everything.
pub(super) async fn run(job: &Arc<Job>) -> Result<(), CommandError> {
    match (&job.source, &job.destination) {
        (Source::Standard, Destination::Standard) => stream::through(job).await,
        (Source::Standard, _) => stream::from_standard_input(job).await,
        (_, Destination::Standard) => stream::to_standard_output(job).await,
        _ => in_parallel(job).await,
    }
}

async fn in_parallel(job: &Arc<Job>) -> Result<(), CommandError> {
    let size = job.source.size().unwrap_or_default();
    if !size.is_multiple_of(job.alignment) {
        return Err(CommandError::new(format!(
            "one side needs requests aligned to {} and the disk's {size} bytes are no multiple of \
             that",
            exact(job.alignment)
        )));
    }
    job.destination.set_size(size)?;
    let mut tasks = JoinSet::new();
    for _ in 0..job.requests {
        let job = job.clone();
        tasks.spawn(async move { job.copy_pieces().await });
    }
    while let Some(ended) = tasks.join_next().await {
        // The first error ends the copy: dropping the set stops the other tasks.
        ended.map_err(|error| CommandError::new(format!("a task was given up: {error}")))??;
    }
    Ok(())
}
