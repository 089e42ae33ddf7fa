//! Many threads that copy pieces of a disk at the same time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use imgfmt::zero::{Content, runs};
use imgfmt::{Durability, GuestOffset, GuestRange, Image, Speed, ZeroMode};
use nbd_client::{ExportStorage, ReadChunk};

use super::super::place::Place;
use super::super::walk::span;
use super::agenda::{Agenda, PIECE, Work};
use crate::error::CommandError;
use crate::progress::Progress;
use crate::signals;

/// What the destination reads as where nothing is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Zero,
    /// Something else, which has to be overwritten.
    HasContent,
}

/// A copy of a whole disk.
pub(super) struct Copy<'a> {
    pub(super) source: &'a Image,
    /// The source, if it is all of another server's export: what is read there tells of holes.
    pub(super) export: Option<&'a ExportStorage>,
    pub(super) from: &'a Place,
    pub(super) destination: &'a Image,
    pub(super) to: &'a Place,
    pub(super) target: Target,
    /// Nothing smaller is written, and zeroes are looked for in this unit; in bytes.
    pub(super) unit: u64,
    pub(super) compress: bool,
    pub(super) progress: &'a Progress,
}

impl Copy<'_> {
    /// Copies everything with so many threads.
    pub(super) fn run(&self, jobs: usize) -> Result<(), CommandError> {
        let agenda = &Mutex::new(Agenda::new(self));
        // One thread failed: the others need not go on.
        let failed = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            let spawn = |_| scope.spawn(move || self.work(agenda, failed));
            let workers: Vec<_> = (0..jobs).map(spawn).collect();
            let mut result = Ok(());
            for worker in workers {
                let ended = worker.join();
                let ended = ended.unwrap_or_else(|_| {
                    Err(CommandError::new("a thread that copied has ended unexpectedly"))
                });
                result = result.and(ended);
            }
            result
        })
    }

    /// Copies one piece after the other until there is none.
    fn work(&self, agenda: &Mutex<Agenda<'_>>, failed: &AtomicBool) -> Result<(), CommandError> {
        let mut buffer = vec![0; PIECE.max(self.unit) as usize];
        while !failed.load(Ordering::Relaxed) {
            signals::stop_if_interrupted()?;
            let next = match agenda.lock() {
                Ok(mut agenda) => agenda.next(),
                // Another thread ended unexpectedly, which its join tells.
                Err(_) => return Ok(()),
            };
            let done = match next {
                Ok(None) => return Ok(()),
                Ok(Some(work)) => self.carry_out(work, &mut buffer),
                Err(error) => Err(error),
            };
            done.inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    }

    fn carry_out(&self, work: Work, buffer: &mut [u8]) -> Result<(), CommandError> {
        match work.content {
            Content::Data => self.copy(work.range, &mut buffer[..work.range.length() as usize])?,
            Content::Zero => self.zero(work.range)?,
        }
        match work.content {
            Content::Data => self.progress.add(work.range.length()),
            Content::Zero => self.progress.add_hole(work.range.length()),
        }
        Ok(())
    }

    fn copy(&self, range: GuestRange, buffer: &mut [u8]) -> Result<(), CommandError> {
        if self.read(range, buffer)? == Content::Zero {
            return match self.target {
                Target::Zero => Ok(()),
                Target::HasContent => self.zero(range),
            };
        }
        for run in runs(buffer, self.unit as usize) {
            let start = range.offset().bytes() + run.start as u64;
            let data = &buffer[run.start..run.end];
            let offset = GuestOffset::new(start);
            let written = match run.content {
                Content::Zero if self.target == Target::Zero => continue,
                Content::Zero => {
                    self.zero(span(start, start + data.len() as u64))?;
                    continue;
                }
                Content::Data if self.compress => self.write_compressed(offset, data),
                Content::Data => self.destination.write_at(offset, data, Durability::Cached),
            };
            written.map_err(|error| self.to.named(error))?;
        }
        Ok(())
    }

    /// Reads a part of the source. If all of it is a hole the buffer stays as it is.
    fn read(&self, range: GuestRange, buffer: &mut [u8]) -> Result<Content, CommandError> {
        let Some(export) = self.export else {
            let read = self.source.read_at(range.offset(), buffer);
            return read.map(|()| Content::Data).map_err(|error| self.from.named(error));
        };
        let start = range.offset().bytes();
        let pieces = export.read_chunks(start..start + buffer.len() as u64).map_err(|error| {
            let from = self.from;
            CommandError::new(format!("cannot read from {from} at offset {start}: {error}"))
        })?;
        if pieces.iter().all(|piece| matches!(piece, ReadChunk::Hole { .. })) {
            return Ok(Content::Zero);
        }
        for piece in pieces {
            // Pieces lie within what was asked for.
            match piece {
                ReadChunk::Data { offset, data } => {
                    buffer[(offset - start) as usize..][..data.len()].copy_from_slice(&data);
                }
                ReadChunk::Hole { offset, length } => {
                    buffer[(offset - start) as usize..][..length as usize].fill(0);
                }
            }
        }
        Ok(Content::Data)
    }

    /// Only whole clusters can be compressed. The source may end within one, while the destination
    /// goes on: its size is rounded up to sectors, or was chosen by somebody else.
    fn write_compressed(&self, offset: GuestOffset, data: &[u8]) -> imgfmt::Result<()> {
        let whole = data.len() / self.unit as usize * self.unit as usize;
        let (whole, tail) = data.split_at(whole);
        self.destination.write_compressed(offset, whole)?;
        let offset = GuestOffset::new(offset.bytes() + whole.len() as u64);
        let room = self.unit.min(self.destination.size() - offset.bytes()) as usize;
        match self.target {
            _ if tail.is_empty() => Ok(()),
            Target::Zero => {
                let mut padded = tail.to_vec();
                padded.resize(room, 0);
                self.destination.write_compressed(offset, &padded)
            }
            // What the destination has behind the end of the source stays.
            Target::HasContent if tail.len() < room => {
                self.destination.write_at(offset, tail, Durability::Cached)
            }
            Target::HasContent => self.destination.write_compressed(offset, tail),
        }
    }

    fn zero(&self, range: GuestRange) -> Result<(), CommandError> {
        let (mode, speed) = (ZeroMode::MayUnmap, Speed::Any);
        let zeroed = self.destination.write_zeroes(range, mode, speed, Durability::Cached);
        zeroed.map_err(|error| self.to.named(error))
    }
}
