//! Many threads that copy pieces of a disk at the same time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use imgfmt::{Durability, ExtentKind, GuestOffset, GuestRange, Image, Speed, ZeroMode};

use super::super::place::Place;
use super::super::walk::{Extents, span};
use crate::commands::copy::zero::{Content, runs};
use crate::error::CommandError;
use crate::progress::Progress;

/// Smallest part of the disk that one thread copies at a time, in bytes.
const PIECE: u64 = 1 << 20;
/// Zeroes are written in pieces of at most this size, in bytes, so that progress shows.
const ZEROES_MAX: u64 = 256 << 20;

/// What the destination reads as where nothing is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Zero,
    /// Something else, which has to be overwritten.
    HasContent,
}

/// A part of the disk to be copied.
#[derive(Clone, Copy, Debug)]
struct Work {
    range: GuestRange,
    content: Content,
}

/// A copy of a whole disk.
pub(super) struct Copy<'a> {
    pub(super) source: &'a Image,
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
        let (sender, receiver) = sync_channel(jobs * 2);
        let receiver = Arc::new(Mutex::new(receiver));
        // One thread failed: the others need not go on.
        let failed = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Each worker has a share of the receiver: without any, handing out fails.
            let spawn = |_| {
                let receiver = Arc::clone(&receiver);
                scope.spawn(move || self.work(&receiver, failed))
            };
            let workers: Vec<_> = (0..jobs).map(spawn).collect();
            drop(receiver);
            let hand_out =
                |work| !failed.load(Ordering::Relaxed) && SyncSender::send(&sender, work).is_ok();
            let mut result = self.find_work(hand_out);
            drop(sender);
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

    /// Hands out the parts of the disk that have to be written, whole units each, until nobody
    /// takes any more.
    fn find_work(&self, mut hand_out: impl FnMut(Work) -> bool) -> Result<(), CommandError> {
        let size = self.source.size();
        let mut extents = Extents::new(self.source);
        let mut done = 0;
        while let Some(extent) = extents.next()? {
            if extent.kind != ExtentKind::Data {
                continue;
            }
            // A unit with any data in it is copied as a whole.
            let start = (extent.range.offset().bytes() / self.unit * self.unit).max(done);
            let end = extent.range.end().bytes();
            let end = end.checked_next_multiple_of(self.unit).unwrap_or(size).min(size);
            if !self.hand_out_zeroes(done, start, &mut hand_out)
                || !self.hand_out_pieces(start, end, Content::Data, &mut hand_out)
            {
                return Ok(());
            }
            done = done.max(end);
        }
        self.hand_out_zeroes(done, size, &mut hand_out);
        Ok(())
    }

    fn hand_out_zeroes(
        &self,
        start: u64,
        end: u64,
        hand_out: &mut impl FnMut(Work) -> bool,
    ) -> bool {
        match self.target {
            Target::HasContent => self.hand_out_pieces(start, end, Content::Zero, hand_out),
            Target::Zero => {
                self.progress.add(end.saturating_sub(start));
                true
            }
        }
    }

    fn hand_out_pieces(
        &self,
        start: u64,
        end: u64,
        content: Content,
        hand_out: &mut impl FnMut(Work) -> bool,
    ) -> bool {
        let piece = match content {
            Content::Data => PIECE.max(self.unit),
            Content::Zero => ZEROES_MAX,
        };
        let mut position = start;
        while position < end {
            let stop = ((position / piece + 1) * piece).min(end);
            if !hand_out(Work { range: span(position, stop), content }) {
                return false;
            }
            position = stop;
        }
        true
    }

    /// Copies what is handed out. After a failure the rest is only taken, so that handing it out
    /// never waits.
    fn work(
        &self,
        receiver: &Mutex<Receiver<Work>>,
        failed: &AtomicBool,
    ) -> Result<(), CommandError> {
        let mut buffer = vec![0; PIECE.max(self.unit) as usize];
        let mut result = Ok(());
        loop {
            let next = match receiver.lock() {
                Ok(receiver) => receiver.recv(),
                // Another thread ended unexpectedly, which its join tells.
                Err(_) => return result,
            };
            let Ok(Work { range, content }) = next else { return result };
            if failed.load(Ordering::Relaxed) {
                continue;
            }
            result = match content {
                Content::Data => self.copy(range, &mut buffer[..range.length() as usize]),
                Content::Zero => self.zero(range),
            };
            if result.is_err() {
                failed.store(true, Ordering::Relaxed);
            }
            self.progress.add(range.length());
        }
    }

    fn copy(&self, range: GuestRange, buffer: &mut [u8]) -> Result<(), CommandError> {
        let read = self.source.read_at(range.offset(), buffer);
        read.map_err(|error| self.from.named(error))?;
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
                Content::Data if self.compress => self.destination.write_compressed(offset, data),
                Content::Data => self.destination.write_at(offset, data, Durability::Cached),
            };
            written.map_err(|error| self.to.named(error))?;
        }
        Ok(())
    }

    fn zero(&self, range: GuestRange) -> Result<(), CommandError> {
        let (mode, speed) = (ZeroMode::MayUnmap, Speed::Any);
        let zeroed = self.destination.write_zeroes(range, mode, speed, Durability::Cached);
        zeroed.map_err(|error| self.to.named(error))
    }
}
