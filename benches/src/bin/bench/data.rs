//! The file that every server serves.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{Advice, fadvise};

use super::options::PageCache;

const CHUNK_BYTES: usize = 1 << 20;

/// A file of incompressible bytes without holes.
#[derive(Debug)]
pub(crate) struct DataFile {
    path: PathBuf,
    page_cache: PageCache,
}

impl DataFile {
    /// Writes a file of `size` bytes, a multiple of 1 MiB, with bytes that are the same in every
    /// run, and drops it from the page cache.
    ///
    /// # Errors
    ///
    /// The file cannot be created or written.
    pub(crate) fn create(path: PathBuf, size: u64, page_cache: PageCache) -> Result<Self> {
        let file = Self { path, page_cache };
        file.fill(size).with_context(|| format!("cannot write {}", file.path.display()))?;
        Ok(file)
    }

    /// Uses an existing file.
    pub(crate) fn existing(path: PathBuf, page_cache: PageCache) -> Self {
        Self { path, page_cache }
    }

    /// Returns the path of the file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Restores the initial state of every block: no dirty pages, and the whole file in the page
    /// cache.
    ///
    /// # Errors
    ///
    /// The file cannot be read or synchronised.
    pub(crate) fn settle_and_warm(&self) -> Result<()> {
        self.sync_and_read().with_context(|| format!("cannot read {}", self.path.display()))
    }

    fn sync_and_read(&self) -> std::io::Result<()> {
        let mut file = OpenOptions::new().read(true).write(true).open(&self.path)?;
        file.sync_data()?;
        if self.page_cache == PageCache::Pages {
            // Without readahead the kernel caches single pages. Readahead would cache folios of up
            // to 2 MiB, of which ext4 walks every block at each write of 4 KiB: 70 us on the
            // machine where this was found, instead of 4 us, which hides the cost of the servers.
            fadvise(&file, 0, None, Advice::Random)?;
        }
        let mut buffer = vec![0; CHUNK_BYTES];
        while file.read(&mut buffer)? > 0 {}
        Ok(())
    }

    fn fill(&self, size: u64) -> std::io::Result<()> {
        let mut file = File::create(&self.path)?;
        let mut random = XorShift::new();
        let mut buffer = vec![0; CHUNK_BYTES];
        for _ in 0..size / CHUNK_BYTES as u64 {
            random.fill(&mut buffer);
            file.write_all(&buffer)?;
        }
        file.sync_all()?;
        // From here on the way in which it was written does not affect caching.
        fadvise(&file, 0, None, Advice::DontNeed)?;
        Ok(())
    }
}

/// Marsaglia's xorshift64: fast, and its output is incompressible.
#[derive(Debug)]
pub(crate) struct XorShift {
    state: u64,
}

impl XorShift {
    pub(crate) fn new() -> Self {
        Self { state: 0x9E37_79B9_7F4A_7C15 }
    }

    pub(crate) fn fill(&mut self, buffer: &mut [u8]) {
        for piece in buffer.chunks_mut(8) {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            piece.copy_from_slice(&self.state.to_le_bytes()[..piece.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_has_its_size_and_no_repeated_chunks() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let file = DataFile::create(directory.path().join("disk.img"), 3 << 20, PageCache::Pages)
            .expect("file");
        let bytes = std::fs::read(file.path()).expect("readable");
        assert_eq!(bytes.len(), 3 << 20);
        assert_ne!(bytes[..4096], bytes[4096..8192]);
        assert_ne!(bytes[..1 << 20], bytes[1 << 20..2 << 20]);
        file.settle_and_warm().expect("readable");
    }

    #[test]
    fn random_bytes_use_every_value() {
        let mut buffer = vec![0; 64 << 10];
        XorShift::new().fill(&mut buffer);
        let mut counts = [0_u32; 256];
        for byte in buffer {
            counts[usize::from(byte)] += 1;
        }
        assert!(counts.iter().all(|count| (128..384).contains(count)), "{counts:?}");
    }
}
