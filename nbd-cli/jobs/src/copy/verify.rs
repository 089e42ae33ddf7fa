//! Reads both sides again and compares checksums.

use std::sync::Arc;

use bytes::BytesMut;
use imgfmt::is_zero;
use tokio::task::JoinSet;

use super::content::Content;
use super::plan::{Lengths, Plan, PlannedRange};
use super::shared_plan::SharedPlan;
use super::source::Source;
use crate::error::{JobError, JobErrorKind};
use crate::observer::{JobContext, Meter, Phase};
use crate::tasks;

/// Longest part with one checksum, in bytes.
const PIECE: u64 = 1 << 20;
/// Longest part reported as zero, in bytes.
const LONGEST_ZEROES: u64 = 1 << 30;

/// A comparison of two disks of the same size.
pub(crate) struct Verification {
    pub(crate) source: Source,
    pub(crate) copy: Source,
    context: JobContext,
    meter: Meter,
    plan: SharedPlan,
}

impl Verification {
    /// Compares the extents of the source that `extents` does not report as unchanged. `unit` is
    /// the request alignment of both sides, in bytes.
    pub(crate) fn new(
        source: Source,
        copy: Source,
        unit: u64,
        extents: super::plan::Extents,
        context: &JobContext,
    ) -> Self {
        let longest = Lengths { data: PIECE.max(unit), zeroes: LONGEST_ZEROES };
        let size = source.size().unwrap_or_default();
        let plan = SharedPlan::new(Plan::new(0, size, unit, longest, extents));
        let meter = Meter::begin(context, Phase::Verifying, source.size(), 0);
        Self { source, copy, context: context.clone(), meter, plan }
    }

    /// Compares with that many tasks; returns the number of bytes compared.
    ///
    /// The first difference is an error.
    pub(crate) async fn run(self: &Arc<Self>, tasks: usize) -> Result<u64, JobError> {
        self.context.cancellation.unless_cancelled(self.compare(tasks)).await
    }

    async fn compare(self: &Arc<Self>, tasks: usize) -> Result<u64, JobError> {
        let mut running = JoinSet::new();
        for _ in 0..tasks {
            let this = Arc::clone(self);
            running.spawn(tasks::boxed(async move { this.compare_pieces().await }));
        }
        let mut compared = 0;
        while let Some(ended) = running.join_next().await {
            compared += ended.map_err(|error| JobError::given_up("task", &error))??;
        }
        Ok(compared)
    }

    async fn compare_pieces(&self) -> Result<u64, JobError> {
        let mut compared = 0;
        loop {
            let range = self.plan.next(|_| {}).await?;
            let Some(range) = range else { return Ok(compared) };
            let equal = match range.content {
                Content::Unchanged => {
                    self.meter.add(range.length, 0);
                    continue;
                }
                Content::Data => self.is_equal(&range).await?,
                Content::Zero => self.is_zero(&range).await?,
            };
            if !equal {
                let kind = JobErrorKind::Mismatch;
                return Err(JobError::new(
                    kind,
                    format!(
                        "the copy differs from the source in the {} bytes at offset {}: either the \
                     source has changed meanwhile or the copy is damaged",
                        range.length, range.offset
                    ),
                ));
            }
            compared += range.length;
            self.meter.add(range.length, 0);
        }
    }

    async fn is_equal(&self, range: &PlannedRange) -> Result<bool, JobError> {
        self.context.keep_rate(range.length).await;
        let (source, copy) = tokio::join!(
            self.source.read(range.offset, range.length, BytesMut::new()),
            self.copy.read(range.offset, range.length, BytesMut::new()),
        );
        Ok(crc32fast::hash(&source?) == crc32fast::hash(&copy?))
    }

    /// Returns whether the copy is zero where the source reports zeroes.
    async fn is_zero(&self, range: &PlannedRange) -> Result<bool, JobError> {
        if self.copy.is_known_zero(range.offset, range.length).await {
            return Ok(true);
        }
        let end = range.offset + range.length;
        let mut at = range.offset;
        while at < end {
            let length = PIECE.min(end - at);
            self.context.keep_rate(length).await;
            if !is_zero(&self.copy.read(at, length, BytesMut::new()).await?) {
                return Ok(false);
            }
            at += length;
        }
        Ok(true)
    }
}
