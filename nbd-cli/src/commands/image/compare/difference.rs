//! The first difference of two disks, looked for by several threads: both disks are read at the same
//! time, and the answers of a server do not have to be waited for one by one.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use imgfmt::{Extent, ExtentKind, Image, is_zero};

use super::super::walk::{Extents, read_padded};
use crate::error::CommandError;

/// How two disks are compared. A disk reads as zero behind its end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Comparison<'a> {
    pub(super) first: &'a Image,
    pub(super) second: &'a Image,
    /// How much of each is read at a time, in bytes.
    pub(super) piece: u64,
    pub(super) threads: NonZeroUsize,
}

impl Comparison<'_> {
    /// The first offset at which the disks differ, if they do. `done` is called with numbers of
    /// bytes that were found to be the same.
    ///
    /// # Errors
    ///
    /// If anything in front of the first difference cannot be read.
    pub(super) fn first_difference(
        &self,
        done: &(impl Fn(u64) + Sync),
    ) -> Result<Option<u64>, CommandError> {
        let search = &Search::new(self);
        let ended = std::thread::scope(|scope| {
            let spawn = |_| scope.spawn(move || search.work(done));
            let workers: Vec<_> = (0..self.threads.get()).map(spawn).collect();
            // All of them have to be joined here, or the scope panics.
            workers
                .into_iter()
                .map(std::thread::ScopedJoinHandle::join)
                .filter(Result::is_err)
                .count()
        });
        if ended > 0 {
            return Err(CommandError::new("a thread that compared has ended unexpectedly"));
        }
        match locked(&search.end).take() {
            None => Ok(None),
            Some(End { offset, why: Why::Difference }) => Ok(Some(offset)),
            Some(End { why: Why::Error(error), .. }) => Err(error),
        }
    }
}

/// What the threads share.
struct Search<'a> {
    comparison: &'a Comparison<'a>,
    agenda: Mutex<Agenda<'a>>,
    end: Mutex<Option<End>>,
    /// Nothing from this offset on matters any more.
    limit: AtomicU64,
}

/// What the search ends with, unless there is something in front of it.
struct End {
    offset: u64,
    why: Why,
}

enum Why {
    Difference,
    Error(CommandError),
}

/// A part of the disks that is data on one of them at least.
struct Piece {
    offset: u64,
    length: usize,
    kinds: [ExtentKind; 2],
}

impl<'a> Search<'a> {
    fn new(comparison: &'a Comparison<'a>) -> Self {
        let Comparison { first, second, .. } = *comparison;
        Self {
            comparison,
            agenda: Mutex::new(Agenda {
                disks: [Cursor::new(first), Cursor::new(second)],
                position: 0,
            }),
            end: Mutex::new(None),
            limit: AtomicU64::new(first.size().max(second.size())),
        }
    }

    /// Compares one piece after the other until nothing is left that matters.
    fn work(&self, done: &impl Fn(u64)) {
        let mut buffers = [(); 2].map(|()| vec![0; self.comparison.piece as usize]);
        loop {
            let mut agenda = locked(&self.agenda);
            let next = agenda.next(self.limit.load(Ordering::Relaxed), self.comparison.piece, done);
            let position = agenda.position;
            drop(agenda);
            let piece = match next {
                Ok(Some(piece)) => piece,
                Ok(None) => return,
                Err(error) => return self.end_at(position, Why::Error(error)),
            };
            match self.compare(&piece, &mut buffers) {
                Ok(None) => done(piece.length as u64),
                Ok(Some(distance)) => {
                    self.end_at(piece.offset + distance as u64, Why::Difference);
                }
                Err(error) => self.end_at(piece.offset, Why::Error(error)),
            }
        }
    }

    /// Where the first difference is, counted from the start of the piece.
    fn compare(
        &self,
        piece: &Piece,
        [first, second]: &mut [Vec<u8>; 2],
    ) -> Result<Option<usize>, CommandError> {
        let (first, second) = (&mut first[..piece.length], &mut second[..piece.length]);
        let disks = self.comparison;
        match piece.kinds {
            [ExtentKind::Data, ExtentKind::Data] => {
                read_padded(disks.first, piece.offset, first)?;
                read_padded(disks.second, piece.offset, second)?;
                let differ = || first.iter().zip(&*second).position(|(a, b)| a != b);
                Ok(if first == second { None } else { differ() })
            }
            [kind, _] => {
                // The other one is zero and need not be read.
                let disk = if kind == ExtentKind::Data { disks.first } else { disks.second };
                read_padded(disk, piece.offset, first)?;
                let differs = || first.iter().position(|&byte| byte != 0);
                Ok(if is_zero(first) { None } else { differs() })
            }
        }
    }

    fn end_at(&self, offset: u64, why: Why) {
        let mut end = locked(&self.end);
        if end.as_ref().is_none_or(|end| offset < end.offset) {
            *end = Some(End { offset, why });
            self.limit.fetch_min(offset, Ordering::Relaxed);
        }
    }
}

/// What is still to be compared, in order.
struct Agenda<'a> {
    disks: [Cursor<'a>; 2],
    position: u64,
}

impl Agenda<'_> {
    /// The next piece, of at most so many bytes, that begins before `limit`.
    fn next(
        &mut self,
        limit: u64,
        most: u64,
        done: &impl Fn(u64),
    ) -> Result<Option<Piece>, CommandError> {
        while self.position < limit {
            let start = self.position;
            let [(first, first_end), (second, second_end)] =
                [self.disks[0].at(start)?, self.disks[1].at(start)?];
            let same_until = first_end.min(second_end).min(limit);
            if first != ExtentKind::Data && second != ExtentKind::Data {
                done(same_until - start);
                self.position = same_until;
                continue;
            }
            self.position = same_until.min((start / most + 1) * most);
            let length = (self.position - start) as usize;
            return Ok(Some(Piece { offset: start, length, kinds: [first, second] }));
        }
        Ok(None)
    }
}

/// Where a disk holds data, found step by step.
#[derive(Debug)]
struct Cursor<'a> {
    extents: Extents<'a>,
    current: Option<Extent>,
    size: u64,
}

impl<'a> Cursor<'a> {
    fn new(image: &'a Image) -> Self {
        Self { extents: Extents::new(image), current: None, size: image.size() }
    }

    /// What is at `offset`, which never goes back, and where that ends. Zero behind the disk.
    fn at(&mut self, offset: u64) -> Result<(ExtentKind, u64), CommandError> {
        if offset >= self.size {
            return Ok((ExtentKind::Hole, u64::MAX));
        }
        loop {
            match self.current {
                Some(extent) if extent.range.end().bytes() > offset => {
                    return Ok((extent.kind, extent.range.end().bytes()));
                }
                _ => self.current = self.extents.next()?,
            }
            if self.current.is_none() {
                return Ok((ExtentKind::Hole, u64::MAX));
            }
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panics is noticed when it is joined.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
