//! Keeps a copy from filling the page cache.
//!
//! The pages of a large file that is written once displace what others on the machine read again
//! and again. Each window is written back as soon as it is complete, and some windows later its
//! pages are given up. Nothing waits for that: what the disk has not taken by then stays, until a
//! group of windows is complete.
//!
//! It also makes copies faster in virtual machines that return their free memory: the host has to
//! find a page for each page of the cache that was not in use before.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;

use imgfmt::Storage;
use rustix::fs::{Advice, fadvise};

/// Sizes, in bytes.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    /// Number of bytes per start of writeback.
    window: u64,
    /// Number of windows that the disk has time for, before their pages are given up.
    behind: usize,
    /// Number of bytes after which the copy waits for the disk.
    group: u64,
    /// Written first, without waiting: a short copy ends before the disk has it.
    unwaited: u64,
}

const SIZES: Sizes = Sizes { window: 8 << 20, behind: 8, group: 512 << 20, unwaited: 1 << 30 };

/// The part of a file that was written and is still in the page cache.
#[derive(Debug)]
pub(super) struct WriteBehind {
    sizes: Sizes,
    /// Bytes written.
    written: u64,
    /// Written since writeback was last started.
    window: WrittenBytes,
    /// The windows whose writeback was started, the oldest first.
    started: VecDeque<WrittenBytes>,
    /// Written since the disk was last waited for.
    group: WrittenBytes,
}

/// Parts of a file that lie close together.
#[derive(Debug, Default)]
struct WrittenBytes {
    bytes: u64,
    /// From the first byte to the last one; there may be gaps.
    range: Option<Range<u64>>,
}

impl WrittenBytes {
    fn add(&mut self, offset: u64, length: u64) {
        let end = offset.saturating_add(length);
        let range = self.range.get_or_insert(offset..end);
        *range = range.start.min(offset)..range.end.max(end);
        self.bytes = self.bytes.saturating_add(length);
    }
}

impl Default for WriteBehind {
    fn default() -> Self {
        Self::new(SIZES)
    }
}

impl WriteBehind {
    fn new(sizes: Sizes) -> Self {
        let (window, group) = Default::default();
        Self { sizes, written: 0, window, started: VecDeque::new(), group }
    }

    /// Notes a write into `storage`.
    ///
    /// # Errors
    ///
    /// Earlier data cannot be written back.
    pub(super) fn wrote(
        &mut self,
        storage: &dyn Storage,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        if storage.as_fd().is_none() {
            return Ok(());
        }
        self.written = self.written.saturating_add(length);
        self.window.add(offset, length);
        self.group.add(offset, length);
        if self.window.bytes >= self.sizes.window {
            // Dirty pages are not given up yet, but this starts to write them.
            let window = std::mem::take(&mut self.window);
            give_up(storage, &window);
            self.started.push_back(window);
        }
        if self.started.len() > self.sizes.behind
            && let Some(oldest) = self.started.pop_front()
        {
            give_up(storage, &oldest);
        }
        if self.group.bytes >= self.sizes.group {
            let group = std::mem::take(&mut self.group);
            if self.written > self.sizes.unwaited {
                // Only clean pages can be given up. Most of them are clean by now.
                storage.sync()?;
                give_up(storage, &group);
            }
        }
        Ok(())
    }
}

/// Gives up the clean pages of a part, and starts to write the dirty ones.
fn give_up(storage: &dyn Storage, part: &WrittenBytes) {
    let Some((fd, range)) = storage.as_fd().zip(part.range.clone()) else { return };
    let length = std::num::NonZeroU64::new(range.end - range.start);
    // Only advice: without it the copy is just as good.
    let _ = fadvise(fd, range.start, length, Advice::DontNeed);
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use imgfmt::storage::FileStorage;
    use imgfmt::{Access, Durability, HostOffset, Locking};

    use super::*;

    const MIB: u64 = 1 << 20;
    const TMPFS: i64 = 0x0102_1994;

    /// Bytes of the file that the page cache holds.
    fn cached(path: &std::path::Path) -> Option<u64> {
        let fincore = Command::new("fincore").args(["-b", "-n", "-o", "RES"]).arg(path).output();
        String::from_utf8(fincore.ok()?.stdout).ok()?.trim().parse().ok()
    }

    #[test]
    fn a_long_copy_leaves_little_in_the_page_cache() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, b"").unwrap();
        let file_system = rustix::fs::statfs(&path).unwrap();
        if cached(&path).is_none() || file_system.f_type as i64 == TMPFS {
            assert!(std::env::var_os("CI").is_none(), "needs fincore, and TMPDIR on a disk");
            eprintln!("skipped: needs fincore, and TMPDIR on a disk");
            return;
        }
        let storage = FileStorage::open(&path, Access::ReadWrite, Locking::Off).unwrap();
        let sizes = Sizes { window: MIB, behind: 2, group: 4 * MIB, unwaited: 8 * MIB };
        let mut behind = WriteBehind::new(sizes);
        let data = vec![7; 1 << 18];
        let mut most = 0;
        for offset in (0..64 * MIB).step_by(data.len()) {
            storage.write_at(HostOffset::new(offset), &data, Durability::Cached).unwrap();
            behind.wrote(&storage, offset, data.len() as u64).unwrap();
            most = most.max(cached(&path).unwrap());
        }
        // A file system may keep some pages, such as those of a large folio.
        assert!(most <= 16 * MIB, "{most} bytes were in the page cache");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 64 * MIB);
    }

    #[test]
    fn parts_out_of_order_are_one_range() {
        let mut part = WrittenBytes::default();
        part.add(100, 10);
        part.add(90, 10);
        part.add(120, 5);
        assert_eq!((part.bytes, part.range), (25, Some(90..125)));
    }
}
