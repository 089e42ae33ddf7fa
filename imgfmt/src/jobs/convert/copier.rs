//! Many threads that copy pieces of a disk at the same time.

use std::sync::atomic::{AtomicBool, Ordering};

use super::agenda::{Agenda, CopyRange, PIECE, SMALL_PIECE};
use super::options::{Background, Clusters, SourceReader, Unreadable, Zeroes};
use super::salvage::read_salvaging;
use super::turns::Turns;
use crate::extent::ExtentKind;
use crate::image::Image;
use crate::jobs::error::{JobError, JobErrorKind};
use crate::jobs::observer::{JobContext, Meter};
use crate::layer::FilledInOrder;
use crate::ordered_lock::{OrderedMutex, rank};
use crate::storage::{Durability, Speed, ZeroMode};
use crate::units::{GuestOffset, GuestRange, span};
use crate::zero::{Content, is_zero, runs};

/// A destination that is written in order, and whose turn it is.
pub(super) struct InOrder<'a> {
    pub(super) image: &'a dyn FilledInOrder,
    pub(super) turns: Turns,
}

/// A copy of a complete disk.
pub(super) struct Copy<'a> {
    pub(super) source: &'a Image,
    /// Reads the source in place of the image itself.
    pub(super) reader: Option<&'a dyn SourceReader>,
    pub(super) destination: &'a Image,
    pub(super) background: Background,
    /// Nothing smaller is written, and zeroes are looked for in this unit; in bytes.
    pub(super) unit: u64,
    pub(super) clusters: Clusters,
    pub(super) zeroes: Zeroes,
    pub(super) unreadable: Unreadable,
    /// The destination, if it is written in order.
    pub(super) in_order: Option<InOrder<'a>>,
    pub(super) context: &'a JobContext,
    pub(super) meter: &'a Meter<'a>,
}

impl Copy<'_> {
    /// Copies everything with this many threads.
    pub(super) fn run(&self, jobs: usize) -> Result<(), JobError> {
        let (background, unreadable) = (self.background, self.unreadable);
        let sizes = (self.unit, self.piece());
        let agenda = Agenda::new(self.source, sizes, background, unreadable, self.meter);
        let agenda = &OrderedMutex::new(agenda);
        // One thread failed: the others need not go on.
        let failed = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            let spawn = |_| scope.spawn(move || self.work(agenda, failed));
            let workers: Vec<_> = (0..jobs).map(spawn).collect();
            let mut result = Ok(());
            for worker in workers {
                let ended = worker.join();
                let ended = ended.unwrap_or_else(|_| {
                    Err(JobError::new(
                        JobErrorKind::Internal,
                        "a thread that copied has ended unexpectedly",
                    ))
                });
                result = result.and(ended);
            }
            result
        })
    }

    /// How much one thread copies at a time, in bytes.
    fn piece(&self) -> u64 {
        let is_encoded = self.in_order.is_some() || self.clusters == Clusters::Compressed;
        let is_plain = !is_encoded && self.reader.is_none() && self.context.rate_limit.is_none();
        if is_plain { PIECE } else { SMALL_PIECE }
    }

    /// Copies one piece after the other until there is none.
    fn work(
        &self,
        agenda: &OrderedMutex<{ rank::AGENDA }, Agenda<'_>>,
        failed: &AtomicBool,
    ) -> Result<(), JobError> {
        let _ended = self.turns().map(Turns::ended_by_panic);
        let mut buffer = vec![0; self.piece().max(self.unit) as usize];
        while !failed.load(Ordering::Relaxed) {
            self.context.cancellation.check()?;
            let next = agenda.lock().next();
            let done = match next {
                Ok(None) => return Ok(()),
                Ok(Some(work)) => self.carry_out(work, &mut buffer, failed),
                Err(error) => Err(error),
            };
            done.inspect_err(|_| {
                failed.store(true, Ordering::Relaxed);
                self.turns().into_iter().for_each(Turns::end);
            })?;
        }
        Ok(())
    }

    fn carry_out(
        &self,
        work: CopyRange,
        buffer: &mut [u8],
        failed: &AtomicBool,
    ) -> Result<(), JobError> {
        match work.content {
            Content::Data => {
                let has_failed = || failed.load(Ordering::Relaxed);
                self.context.keep_rate(work.range.length(), has_failed)?;
                if has_failed() {
                    return Ok(());
                }
                let buffer = &mut buffer[..work.range.length() as usize];
                match &self.in_order {
                    Some(in_order) => self.copy_in_order(work, in_order, buffer)?,
                    None => self.copy(work.range, buffer)?,
                }
                self.meter.add(work.range.length());
            }
            Content::Zero => {
                if let Some(turns) = self.turns()
                    && !turns.wait_for(work.number)
                {
                    return Ok(());
                }
                self.zero(work.range)?;
                self.turns().into_iter().for_each(Turns::pass);
                self.meter.add_hole(work.range.length());
            }
        }
        Ok(())
    }

    fn copy(&self, range: GuestRange, buffer: &mut [u8]) -> Result<(), JobError> {
        if self.read(range, buffer)? == Content::Zero {
            return match self.background {
                Background::Zero => Ok(()),
                Background::Unknown | Background::Compared => self.zero(range),
            };
        }
        if self.background == Background::Compared {
            return self.copy_differences(range, buffer);
        }
        self.write(range.offset().bytes(), buffer)
    }

    /// Writes data that begins where a unit does.
    fn write(&self, start: u64, data: &[u8]) -> Result<(), JobError> {
        for run in runs(data, self.unit as usize) {
            let start = start + run.start as u64;
            let data = &data[run.start..run.end];
            let offset = GuestOffset::new(start);
            let written = match run.content {
                Content::Zero if self.background == Background::Zero => continue,
                Content::Zero => {
                    self.zero(span(start, start + data.len() as u64))?;
                    continue;
                }
                Content::Data if self.clusters == Clusters::Compressed => {
                    self.write_compressed(offset, data)
                }
                Content::Data => self.destination.write_at(offset, data, Durability::Cached),
            };
            written.map_err(JobError::destination)?;
        }
        Ok(())
    }

    /// Writes the units of a piece that differ from what the destination reads as.
    fn copy_differences(&self, range: GuestRange, data: &[u8]) -> Result<(), JobError> {
        let (start, unit) = (range.offset().bytes(), self.unit as usize);
        let mut there = vec![0; data.len()];
        self.destination.read_at(range.offset(), &mut there).map_err(JobError::destination)?;
        let units = data.chunks(unit).zip(there.chunks(unit));
        let differ: Vec<_> = units.map(|(new, old)| new != old).collect();
        let mut first = 0;
        for same in differ.chunk_by(|one, next| one == next) {
            let end = first + same.len();
            if same[0] {
                let bytes = first * unit..(end * unit).min(data.len());
                self.write(start + bytes.start as u64, &data[bytes])?;
            }
            first = end;
        }
        Ok(())
    }

    fn turns(&self) -> Option<&Turns> {
        self.in_order.as_ref().map(|in_order| &in_order.turns)
    }

    /// Reads and encodes a piece, and appends it when it is its turn. What is zero is left out.
    fn copy_in_order(
        &self,
        work: CopyRange,
        InOrder { image, turns }: &InOrder<'_>,
        buffer: &mut [u8],
    ) -> Result<(), JobError> {
        let failed = |error| JobError::destination(self.destination.name(error));
        let mut encoded = Vec::new();
        if self.read(work.range, buffer)? == Content::Data {
            let starts = (work.range.offset().bytes()..).step_by(self.unit as usize);
            for (start, unit) in starts.zip(buffer.chunks(self.unit as usize)) {
                if !is_zero(unit) {
                    let offset = GuestOffset::new(start);
                    encoded.push((offset, image.encode(offset, unit).map_err(failed)?));
                }
            }
        }
        if !turns.wait_for(work.number) {
            return Ok(());
        }
        for (offset, unit) in encoded {
            image.append(offset, &unit).map_err(failed)?;
        }
        turns.pass();
        Ok(())
    }

    /// Reads a part of the source. If all of it is a hole the buffer stays as it is.
    fn read(&self, range: GuestRange, buffer: &mut [u8]) -> Result<Content, JobError> {
        match self.reader {
            Some(reader) => reader
                .read(range.offset(), buffer)
                .map_err(|message| JobError::new(JobErrorKind::Source, message)),
            None => {
                match self.unreadable {
                    Unreadable::Refused => {
                        self.source.read_at(range.offset(), buffer).map_err(JobError::source)?;
                    }
                    Unreadable::Zeroed => {
                        read_salvaging(self.source, range.offset(), buffer, self.context)?;
                    }
                }
                Ok(Content::Data)
            }
        }
    }

    /// Only complete clusters can be compressed. The source may end within a cluster and the
    /// destination after it: its size is rounded up to sectors, or was chosen by the user.
    fn write_compressed(&self, offset: GuestOffset, data: &[u8]) -> crate::error::Result<()> {
        let whole = data.len() / self.unit as usize * self.unit as usize;
        let (whole, tail) = data.split_at(whole);
        self.destination.write_compressed(offset, whole)?;
        let offset = GuestOffset::new(offset.bytes() + whole.len() as u64);
        let room = self.unit.min(self.destination.size() - offset.bytes()) as usize;
        match self.background {
            _ if tail.is_empty() => Ok(()),
            Background::Zero => {
                let mut padded = tail.to_vec();
                padded.resize(room, 0);
                self.destination.write_compressed(offset, &padded)
            }
            // The destination keeps its content beyond the end of the source.
            _ if tail.len() < room => self.destination.write_at(offset, tail, Durability::Cached),
            _ => self.destination.write_compressed(offset, tail),
        }
    }

    /// Sets a range of complete units to zero, where it is not.
    fn zero(&self, range: GuestRange) -> Result<(), JobError> {
        if self.background != Background::Compared {
            return self.write_zeroes(range);
        }
        let (unit, end) = (self.unit, range.end().bytes());
        let mut done = range.offset().bytes();
        // Not what reads as zero in blocks of the image below.
        for extent in self.destination.extents(range).into_blocks() {
            self.context.cancellation.check()?;
            let extent = extent.map_err(JobError::destination)?;
            if extent.kind == ExtentKind::Data {
                let start = (extent.range.offset().bytes() / unit * unit).max(done);
                let stop = extent.range.end().bytes().checked_next_multiple_of(unit);
                done = stop.unwrap_or(end).min(end).max(done);
                self.write_zeroes(span(start, done))?;
            }
        }
        Ok(())
    }

    fn write_zeroes(&self, range: GuestRange) -> Result<(), JobError> {
        if self.zeroes == Zeroes::Data {
            let (mut position, end) = (range.offset().bytes(), range.end().bytes());
            let zeroes = vec![0; (end - position).min(PIECE) as usize];
            while position < end {
                self.context.cancellation.check()?;
                let length = (end - position).min(PIECE);
                let (offset, data) = (GuestOffset::new(position), &zeroes[..length as usize]);
                let written = self.destination.write_at(offset, data, Durability::Cached);
                written.map_err(JobError::destination)?;
                position += length;
            }
            return Ok(());
        }
        let (mode, speed) = (ZeroMode::MayUnmap, Speed::Any);
        let zeroed = self.destination.write_zeroes(range, mode, speed, Durability::Cached);
        zeroed.map_err(JobError::destination)
    }
}
