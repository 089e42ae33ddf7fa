//! Checks the options, by themselves and against the export.

use std::time::Duration;

use nbd_client::ExportInfo;
use nbd_proto::handshake::Negotiated;
use nbd_proto::wire::TransmissionFlags;

use super::block::MIN_BLOCK_LEN;
use super::ledger::MAX_BLOCKS;
use super::options::{BenchEnd, BenchOptions, BlockSize, Pattern, Verify, Workload};
use super::state::State;
use super::targets::Section;
use crate::error::JobError;
use crate::size::exact;

/// Largest request, in bytes.
const MAX_REQUEST_LEN: u32 = 32 << 20;

/// Most memory for data that is written or verified, in bytes.
const MAX_DATA_LEN: u64 = 4 << 30;

const MAX_CONNECTIONS: usize = 256;
const MAX_DEPTH: u32 = 4096;

/// The disk space and the sizes of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// The part of the disk.
    pub(super) range: Section,
    /// Size of a block that is verified: the smallest request. In bytes.
    pub(super) block_len: u32,
    /// The largest request, in bytes.
    pub(super) largest: u32,
    pub(super) connections: u64,
}

/// Refuses options that contradict each other or are out of range.
pub(super) fn check(options: &BenchOptions) -> Result<(), JobError> {
    let refuse = |message: String| Err(JobError::invalid(message));
    if options.connect.connections.get() > MAX_CONNECTIONS || options.depth.get() > MAX_DEPTH {
        return refuse(format!(
            "--connections is limited to {MAX_CONNECTIONS} and --depth to {MAX_DEPTH}; give smaller \
             numbers"
        ));
    }
    if options.block_sizes.is_empty() || options.block_sizes.iter().any(|size| size.weight == 0) {
        return refuse("--block-size needs sizes with weights of at least 1".to_owned());
    }
    for size in &options.block_sizes {
        let length = size.length;
        if !length.is_multiple_of(512) || !(512..=MAX_REQUEST_LEN).contains(&length) {
            let length = exact(length.into());
            return refuse(format!(
                "--block-size {length} is not possible; give multiples of 512 up to 32M"
            ));
        }
    }
    if let Pattern::Zipfian { theta } = options.pattern
        && !(theta > 0.0 && theta <= 10.0)
    {
        return refuse(format!("--zipf {theta} is not possible; give more than 0, at most 10"));
    }
    if let Workload::Mixed { read_percent: 101.. } = options.workload {
        return refuse("--read-percent is limited to 100".to_owned());
    }
    if matches!(options.end, BenchEnd::After(time) if time == Duration::ZERO)
        || options.end == BenchEnd::Requests(0)
    {
        return refuse("a load of no time or no requests measures nothing".to_owned());
    }
    check_verify(options)
}

fn check_verify(options: &BenchOptions) -> Result<(), JobError> {
    let refuse = |message: &str| Err(JobError::invalid(message));
    match &options.verify {
        Verify::Off => return Ok(()),
        Verify::Written { .. } => {
            if !matches!(options.workload, Workload::Write | Workload::Mixed { .. }) {
                return refuse("--verify needs writes: add --workload write or --workload mixed");
            }
        }
        Verify::Only { state: None } if options.seed.is_none() => {
            return refuse(
                "--verify-only needs to know what was written: give --verify-state FILE or the --seed \
                 of that run",
            );
        }
        Verify::Only { .. } => {}
    }
    let smallest = options.block_sizes.iter().map(|size| size.length).min().unwrap_or(0);
    if smallest < MIN_BLOCK_LEN
        || options.block_sizes.iter().any(|size| !size.length.is_multiple_of(smallest))
    {
        return refuse("--verify needs sizes that are multiples of the smallest --block-size");
    }
    Ok(())
}

impl Plan {
    /// Fits the options to an export, and to the blocks of an earlier run.
    pub(super) fn new(
        options: &BenchOptions,
        negotiated: &Negotiated,
        state: Option<&State>,
    ) -> Result<Self, JobError> {
        let lengths = options.block_sizes.iter().map(|size| size.length);
        let (largest, mut block_len) =
            (lengths.clone().max().unwrap_or(0), lengths.min().unwrap_or(0));
        let size = negotiated.size;
        let (offset, length) = match (options.range, state) {
            ((0, None), Some(state)) => {
                block_len = state.block_len;
                (state.start, Some(state.blocks.len() as u64 * u64::from(block_len)))
            }
            (range, _) => range,
        };
        let length = length.unwrap_or(size.saturating_sub(offset));
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(JobError::invalid(format!(
                "the range of {} bytes from {offset} does not fit in the disk of {size} bytes; give \
                 another --range",
                length
            )));
        }
        let connections = options.connect.connections.get() as u64;
        let plan = Self { range: Section { offset, length }, block_len, largest, connections };
        plan.check_size(options)?;
        plan.check_state(options, state)?;
        plan.check_constraints(negotiated)?;
        Ok(plan)
    }

    fn check_size(&self, options: &BenchOptions) -> Result<(), JobError> {
        let part = self.range.part(0, self.connections, self.block_len.into());
        if part.length < u64::from(self.largest) {
            return Err(JobError::invalid(format!(
                "a range of {} bytes is too small for requests of {} on {} connection(s); give \
                 another --range",
                self.range.length,
                exact(self.largest.into()),
                self.connections
            )));
        }
        let verifies = options.verify != Verify::Off;
        if verifies && self.range.length / u64::from(self.block_len.max(1)) > MAX_BLOCKS {
            return Err(JobError::invalid(format!(
                "--verify keeps track of {MAX_BLOCKS} blocks at most; give a smaller --range"
            )));
        }
        let data = self.connections * u64::from(options.depth.get()) * u64::from(self.largest);
        if (verifies || options.writes()) && data > MAX_DATA_LEN {
            return Err(JobError::invalid(
                "so many requests of this size need more than 4G of memory; give a smaller --depth, \
                 --connections or --block-size",
            ));
        }
        Ok(())
    }

    fn check_state(&self, options: &BenchOptions, state: Option<&State>) -> Result<(), JobError> {
        let Some(state) = state else { return Ok(()) };
        let blocks = self.range.length / u64::from(self.block_len.max(1));
        let is_same = (state.start, state.block_len, state.blocks.len() as u64)
            == (self.range.offset, self.block_len, blocks);
        // A part of a block cannot say what it is.
        let is_whole = |size: &BlockSize| size.length.is_multiple_of(self.block_len);
        if is_same && (!options.writes() || options.block_sizes.iter().all(is_whole)) {
            return Ok(());
        }
        Err(JobError::invalid(format!(
            "the state is that of {} blocks of {} from offset {}; leave out --range and give the same \
             --block-size, or name another --verify-state",
            state.blocks.len(),
            exact(state.block_len.into()),
            state.start
        )))
    }

    fn check_constraints(&self, negotiated: &Negotiated) -> Result<(), JobError> {
        let (minimum, maximum) =
            (negotiated.block_sizes.minimum(), negotiated.block_sizes.maximum_payload());
        if !self.block_len.is_multiple_of(minimum)
            || !self.range.offset.is_multiple_of(minimum.into())
        {
            return Err(JobError::invalid(format!(
                "the server takes only multiples of {minimum} bytes; give such a --block-size and \
                 --range"
            )));
        }
        if self.largest > maximum {
            return Err(JobError::invalid(format!(
                "the server takes requests of {maximum} bytes at most; give a smaller --block-size"
            )));
        }
        Ok(())
    }

    /// The blocks of each connection, as ranges of their numbers.
    pub(super) fn blocks(&self, index: u64) -> std::ops::Range<usize> {
        let section = self.section(index);
        let unit = u64::from(self.block_len.max(1));
        let first = (section.offset - self.range.offset) / unit;
        first as usize..(first + section.length / unit) as usize
    }

    /// The part of the disk that one connection uses alone.
    pub(super) fn section(&self, index: u64) -> Section {
        self.range.part(index, self.connections, self.block_len.into())
    }
}

/// Refuses requests that the export does not support.
pub(super) fn check_export(
    options: &BenchOptions,
    info: &ExportInfo,
    uri: &str,
) -> Result<(), JobError> {
    let refuse = |what: &str| Err(JobError::source(format!("{uri} {what}")));
    let has = |flag| info.flags.contains(flag);
    if options.writes() && has(TransmissionFlags::READ_ONLY) {
        return refuse("is read-only; choose --workload read or another export");
    }
    let writes = options.writes();
    for (is_wanted, flag, what) in [
        (
            writes && options.workload == Workload::Zeroes,
            TransmissionFlags::SEND_WRITE_ZEROES,
            "has no WRITE_ZEROES; choose another --workload",
        ),
        (
            writes && options.workload == Workload::Trim,
            TransmissionFlags::SEND_TRIM,
            "has no TRIM; choose another --workload",
        ),
        (writes && options.fua, TransmissionFlags::SEND_FUA, "has no FUA; leave out --fua"),
        (
            writes && options.flush_every.is_some(),
            TransmissionFlags::SEND_FLUSH,
            "has no FLUSH; leave out --flush-every",
        ),
        (
            options.verify != Verify::Off && options.connect.connections.get() > 1,
            TransmissionFlags::CAN_MULTI_CONN,
            "does not promise that connections see each other's writes (no CAN_MULTI_CONN); give \
             --connections 1 to verify",
        ),
    ] {
        if is_wanted && !has(flag) {
            return refuse(what);
        }
    }
    Ok(())
}
