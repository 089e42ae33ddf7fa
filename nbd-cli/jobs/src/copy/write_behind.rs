//! Keeps a long copy from filling the page cache.
//!
//! The pages of a large file that is written once displace what others on the machine read again
//! and again. After a first part, which is left to the kernel, each window is written back as soon
//! as it is complete, and after some windows their pages are given up.

use std::io;
use std::ops::Range;

use imgfmt::Storage;
use rustix::fs::{Advice, fadvise};

/// Sizes, in bytes.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    /// Written first, and left to the kernel: a short copy ends before the disk has it.
    kept: u64,
    /// Number of bytes per start of writeback.
    window: u64,
    /// Number of bytes after which pages are dropped from the cache.
    group: u64,
}

const SIZES: Sizes = Sizes { kept: 1 << 30, window: 32 << 20, group: 512 << 20 };

/// The part of a file that was written and is still in the page cache.
#[derive(Debug)]
pub(super) struct WriteBehind {
    sizes: Sizes,
    /// Bytes written.
    written: u64,
    /// Written since writeback was last started.
    window: WrittenBytes,
    /// Written since pages were last given up.
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
        Self { sizes, written: 0, window: WrittenBytes::default(), group: WrittenBytes::default() }
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
        self.written = self.written.saturating_add(length);
        self.window.add(offset, length);
        self.group.add(offset, length);
        if self.written <= self.sizes.kept || storage.as_fd().is_none() {
            return Ok(());
        }
        if self.window.bytes >= self.sizes.window {
            // Dirty pages are not given up yet, but this starts to write them.
            give_up(storage, std::mem::take(&mut self.window));
        }
        if self.group.bytes >= self.sizes.group {
            // Only clean pages can be given up. Most of them are clean by now.
            storage.sync()?;
            give_up(storage, std::mem::take(&mut self.group));
        }
        Ok(())
    }
}

/// Gives up the clean pages of a part, and starts to write the dirty ones.
fn give_up(storage: &dyn Storage, part: WrittenBytes) {
    let Some((fd, range)) = storage.as_fd().zip(part.range) else { return };
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
        let sizes = Sizes { kept: 4 * MIB, window: MIB, group: 4 * MIB };
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
