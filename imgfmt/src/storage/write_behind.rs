//! Keeps a file that is written once from filling the page cache.
//!
//! The pages of a large file that is written once displace what others on the machine read again
//! and again. After the first part, each window is written back as soon as it is complete, and some
//! windows later its pages are given up; what the disk has not taken by then, when a group of
//! windows is complete.

mod pages;

use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};

pub(super) use self::pages::Pages;
use self::pages::{Helper, Part, SIZES, Sizes};
use crate::error::LostWriteback;
use crate::ordered_lock::{OrderedMutex, rank};

/// What waits in the page cache for a slow disk, of a file that is written once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backlog {
    /// As much as the system lets any program write ahead: writes do not wait sooner.
    OfSystem,
    /// At most about 1.5 GiB: beyond the first GiB, writes wait for the disk after each 512 MiB.
    Limited,
}

/// The parts of a file that were written and may still be in the page cache.
pub(super) struct WriteBehind {
    pages: Arc<dyn Pages>,
    sizes: Sizes,
    backlog: Backlog,
    written: OrderedMutex<{ rank::WRITTEN_PARTS }, Written>,
    /// Started with the first window; `None` if the system has no thread for it.
    helper: OnceLock<Option<Helper>>,
    /// The error of data that could not be written back. Held while the system is asked for one:
    /// others must not go on as if there were none, until it is here.
    lost: OrderedMutex<{ rank::LOST_PARTS }, Option<i32>>,
}

#[derive(Debug, Default)]
struct Written {
    /// Written since the last window was complete.
    window: Part,
    /// Whether the first part is complete, which is left alone.
    has_first: bool,
    /// Written after it, since the disk was last waited for.
    unwaited: u64,
}

impl WriteBehind {
    pub(super) fn new(pages: Arc<dyn Pages>, backlog: Backlog) -> Self {
        Self::with_sizes(pages, backlog, SIZES)
    }

    fn with_sizes(pages: Arc<dyn Pages>, backlog: Backlog, sizes: Sizes) -> Self {
        let (written, helper, lost) = Default::default();
        Self { pages, sizes, backlog, written, helper, lost }
    }

    /// Notes a write.
    ///
    /// # Errors
    ///
    /// Earlier data could not be written back.
    pub(super) fn wrote(&self, offset: u64, length: u64) -> io::Result<()> {
        let Some((window, waits)) = self.add(offset, length) else { return Ok(()) };
        if waits {
            self.noted(|| self.pages.wait())?;
        }
        let start = || Helper::start(Arc::clone(&self.pages), self.sizes);
        if let Some(helper) = self.helper.get_or_init(start) {
            helper.give_up(window);
        }
        self.check()
    }

    /// Adds a write; returns a window that is complete, and whether the disk has to be waited for.
    fn add(&self, offset: u64, length: u64) -> Option<(Part, bool)> {
        let mut written = self.written.lock();
        written.window.add(length, &(offset..offset.saturating_add(length)));
        let least = if written.has_first { self.sizes.window } else { self.sizes.first };
        if written.window.bytes < least {
            return None;
        }
        let window = std::mem::take(&mut written.window);
        if std::mem::replace(&mut written.has_first, true) {
            written.unwaited = written.unwaited.saturating_add(window.bytes);
        }
        let waits = self.backlog == Backlog::Limited && written.unwaited >= self.sizes.group;
        if waits {
            written.unwaited = 0;
        }
        Some((window, waits))
    }

    /// Fails, now and from now on, if data could not be written back. Does not wait for the disk.
    ///
    /// # Errors
    ///
    /// That of the system.
    pub(super) fn check(&self) -> io::Result<()> {
        self.noted(|| self.pages.check())
    }

    fn noted(&self, ask: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut lost = self.lost.lock();
        if lost.is_none() {
            *lost = ask().err().map(|error| error.raw_os_error().unwrap_or(libc::EIO));
        }
        lost.map_or(Ok(()), |code| Err(LostWriteback::error(code)))
    }
}

impl fmt::Debug for WriteBehind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteBehind").field("written", &self.written).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
