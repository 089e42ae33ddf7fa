//! The parts of the disk still to be copied.

use std::collections::VecDeque;

use super::options::{Background, Unreadable};
use super::salvage::is_lost;
use crate::extent::ExtentKind;
use crate::image::{Extents, Image};
use crate::jobs::error::JobError;
use crate::jobs::observer::Meter;
use crate::units::{GuestRange, span};
use crate::zero::Content;

/// Smallest part of the disk that one thread copies at a time, in bytes: it fits into the
/// processor's cache between read and write. Threads that write into one file wait for each other,
/// and where other programs use the processors, each handover takes long: so it is not smaller.
pub(super) const PIECE: u64 = 1 << 20;
/// The same where most of the time is not that of writing into a file: many threads hold one.
pub(super) const SMALL_PIECE: u64 = 256 << 10;
/// Zeroes are written in pieces of at most this size, in bytes, so that progress is visible.
const ZEROES_MAX: u64 = 256 << 20;

/// A part of the disk to be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CopyRange {
    pub(super) range: GuestRange,
    pub(super) content: Content,
    /// How many pieces are before it.
    pub(super) number: u64,
}

/// All parts of a disk that have to be written, in order; each is a number of complete units.
pub(super) struct Agenda<'a> {
    source: &'a Image,
    extents: Extents<&'a Image>,
    /// Everything before this was walked through.
    walked: u64,
    unreadable: Unreadable,
    size: u64,
    unit: u64,
    piece: u64,
    background: Background,
    meter: &'a Meter<'a>,
    /// The parts that were found and not handed out yet.
    found: VecDeque<CopyRange>,
    /// Everything before this was found.
    done: u64,
    is_complete: bool,
    /// How many pieces were handed out.
    handed: u64,
}

impl<'a> Agenda<'a> {
    pub(super) fn new(
        source: &'a Image,
        (unit, piece): (u64, u64),
        background: Background,
        unreadable: Unreadable,
        meter: &'a Meter<'a>,
    ) -> Self {
        Self {
            source,
            extents: source.extents(source.whole()).into_blocks(),
            walked: 0,
            unreadable,
            size: source.size(),
            unit,
            piece,
            background,
            meter,
            found: VecDeque::new(),
            done: 0,
            is_complete: false,
            handed: 0,
        }
    }

    /// The next piece; `None` at the end of the disk.
    pub(super) fn next(&mut self) -> Result<Option<CopyRange>, JobError> {
        loop {
            if let Some(piece) = self.next_piece() {
                return Ok(Some(piece));
            }
            if self.is_complete {
                return Ok(None);
            }
            let next = self.next_extent().transpose();
            // After an error the walk ends: that is not the end of the disk, nor zeroes up to it.
            self.is_complete = next.is_err();
            match next.map_err(JobError::source)? {
                None => {
                    self.zero_until(self.size);
                    self.is_complete = true;
                }
                Some((ExtentKind::Data, range)) => self.data(range),
                Some(_) => {}
            }
        }
    }

    /// What is not known, because its metadata is damaged, is read as data.
    fn next_extent(&mut self) -> Option<crate::error::Result<(ExtentKind, GuestRange)>> {
        match self.extents.next()? {
            Ok(extent) => {
                self.walked = extent.range.end().bytes();
                Some(Ok((extent.kind, extent.range)))
            }
            Err(error) if self.unreadable == Unreadable::Zeroed && is_lost(&error) => {
                let start = self.walked;
                self.walked = ((start / self.unit + 1) * self.unit).min(self.size);
                let rest = span(self.walked, self.size);
                self.extents = self.source.extents(rest).into_blocks();
                let range = span(start, self.walked);
                (!range.is_empty()).then_some(Ok((ExtentKind::Data, range)))
            }
            Err(error) => Some(Err(error)),
        }
    }

    fn next_piece(&mut self) -> Option<CopyRange> {
        let work = self.found.front_mut()?;
        let most = match work.content {
            Content::Data => self.piece.max(self.unit),
            Content::Zero => ZEROES_MAX,
        };
        let (start, end) = (work.range.offset().bytes(), work.range.end().bytes());
        let stop = ((start / most + 1) * most).min(end);
        let piece =
            CopyRange { range: span(start, stop), content: work.content, number: self.handed };
        self.handed += 1;
        work.range = span(stop, end);
        if stop == end {
            self.found.pop_front();
        }
        Some(piece)
    }

    /// A unit with any data in it is copied as a whole.
    fn data(&mut self, range: GuestRange) {
        let start = (range.offset().bytes() / self.unit * self.unit).max(self.done);
        let end = range.end().bytes();
        let end = end.checked_next_multiple_of(self.unit).unwrap_or(self.size).min(self.size);
        self.zero_until(start);
        if start < end {
            let range = span(start, end);
            self.found.push_back(CopyRange { range, content: Content::Data, number: 0 });
            self.done = end;
        }
    }

    fn zero_until(&mut self, end: u64) {
        if end <= self.done {
            return;
        }
        let range = span(self.done, end);
        match self.background {
            Background::Zero => self.meter.add_hole(range.length()),
            Background::Unknown | Background::Compared => {
                self.found.push_back(CopyRange { range, content: Content::Zero, number: 0 });
            }
        }
        self.done = end;
    }
}
