//! Gives up pages of a file that is written once, on a thread of its own: the thread that starts to
//! write pages back waits while the disk takes no more requests, which halved the speed of copies
//! with two threads.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

/// Sizes, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// Number of bytes that are left alone: what ends before that need not compete with its own
    /// writeback.
    pub(super) first: u64,
    /// Number of bytes per start of writeback.
    pub(super) window: u64,
    /// At most so much is given up by one call: the end of the file waits for a call in progress.
    pub(super) step: u64,
    /// Number of windows that the disk has time for, before their pages are given up.
    pub(super) behind: usize,
    /// Number of bytes after which they are given up again.
    pub(super) group: u64,
}

pub(super) const SIZES: Sizes =
    Sizes { first: 1 << 30, window: 8 << 20, step: 1 << 20, behind: 8, group: 512 << 20 };
/// A wide range has little in each part.
const STEPS_MAX: u64 = 64;

/// The pages of a file in the page cache.
pub(in crate::storage) trait Pages: Send + Sync + 'static {
    /// Gives up the clean pages of a range, and starts to write the dirty ones. Only advice:
    /// without it the file is just as good.
    fn give_up(&self, range: Range<u64>);

    /// Waits until everything is written back.
    fn wait(&self) -> io::Result<()>;

    /// Fails if data could not be written back. Does not wait. The system tells each failure once.
    fn check(&self) -> io::Result<()>;
}

/// Bytes that were written, and from the first to the last one; there may be gaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) bytes: u64,
    pub(super) range: Range<u64>,
}

impl Part {
    pub(super) fn add(&mut self, bytes: u64, range: &Range<u64>) {
        self.range = match self.bytes {
            0 => range.clone(),
            _ => self.range.start.min(range.start)..self.range.end.max(range.end),
        };
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

/// The thread that gives pages up; it ends when this is dropped.
pub(super) struct Helper {
    windows: Option<Sender<Part>>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Helper {
    pub(super) fn start(pages: Arc<dyn Pages>, sizes: Sizes) -> Option<Self> {
        let (windows, received) = channel();
        let is_over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&is_over);
        let run = move || give_up_all(&*pages, sizes, &received, &ended);
        let thread = thread::Builder::new().name("write-behind".to_owned()).spawn(run);
        Some(Self { windows: Some(windows), is_over, thread: Some(thread.ok()?) })
    }

    /// A disk that is slower than the writer makes a queue, of a few bytes for each window.
    pub(super) fn give_up(&self, window: Part) {
        if let Some(windows) = &self.windows {
            // An error: the thread has panicked. The file is as good without it.
            let _ = windows.send(window);
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.is_over.store(true, Relaxed);
        self.windows = None;
        // It holds the file, and its user may want to do something else with it.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

pub(super) fn give_up_all(
    pages: &dyn Pages,
    sizes: Sizes,
    windows: &Receiver<Part>,
    is_over: &AtomicBool,
) {
    let give_up = |range: &Range<u64>| {
        let step = sizes.step.max((range.end - range.start).div_ceil(STEPS_MAX));
        let mut start = range.start;
        while start < range.end && !is_over.load(Relaxed) {
            let end = start.saturating_add(step).min(range.end);
            pages.give_up(start..end);
            start = end;
        }
    };
    // The windows whose writeback was started, the oldest first.
    let mut started = VecDeque::new();
    // The complete windows since everything was last given up again, and those before that.
    let (mut group, mut before) = (Part::default(), Part::default());
    for window in windows {
        if is_over.load(Relaxed) {
            return;
        }
        group.add(window.bytes, &window.range);
        // Dirty pages are not given up yet, but this starts to write them.
        give_up(&window.range);
        started.push_back(window.range);
        if started.len() > sizes.behind
            && let Some(oldest) = started.pop_front()
        {
            give_up(&oldest);
        }
        if group.bytes >= sizes.group {
            let next = std::mem::take(&mut group);
            before.add(next.bytes, &next.range);
            give_up(&before.range);
            before = next;
        }
    }
}
