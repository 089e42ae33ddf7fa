//! The file that every server serves.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{Advice, SeekFrom, fadvise};
use rustix::io::Errno;

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

    /// Establishes the initial state of every block: no dirty pages, and all data in the page
    /// cache, always in the same units. It first drops what the page cache has, because the kernel
    /// reclaims and reads ahead while servers run.
    ///
    /// # Errors
    ///
    /// The file cannot be read or synchronised.
    pub(crate) fn settle_and_warm(&self) -> Result<()> {
        self.settle_and_warm_from(0)
    }

    /// As [`settle_and_warm`](Self::settle_and_warm), from this offset in bytes on.
    ///
    /// # Errors
    ///
    /// The file cannot be read or synchronised.
    pub(crate) fn settle_and_warm_from(&self, offset: u64) -> Result<()> {
        self.sync_and_read(offset).with_context(|| format!("cannot read {}", self.path.display()))
    }

    /// Writes dirty pages, and drops the whole file from the page cache.
    ///
    /// # Errors
    ///
    /// The file cannot be opened or synchronised.
    pub(crate) fn drop_from_page_cache(&self) -> Result<()> {
        let dropped = File::open(&self.path).and_then(|file| {
            file.sync_data()?;
            Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
        });
        dropped.with_context(|| self.path.display().to_string())
    }

    fn sync_and_read(&self, offset: u64) -> std::io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(&self.path)?;
        file.sync_data()?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
        if self.page_cache == PageCache::Pages {
            // Without readahead the kernel caches single pages. Readahead would cache folios of up
            // to 2 MiB, and ext4 walks every block of such a folio at each write of 4 KiB. That
            // took 70 us instead of 4 us on the machine where this was found, and hides the cost of
            // the servers.
            fadvise(&file, 0, None, Advice::Random)?;
        }
        let mut buffer = vec![0; CHUNK_BYTES];
        for extent in data_extents(&file)? {
            let mut at = extent.start.max(offset);
            while at < extent.end {
                let length = (extent.end - at).min(CHUNK_BYTES as u64) as usize;
                file.read_exact_at(&mut buffer[..length], at)?;
                at += length as u64;
            }
        }
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
        // From here on, the way in which the file was written does not affect caching.
        fadvise(&file, 0, None, Advice::DontNeed)?;
        Ok(())
    }
}

/// The parts of a file that are not holes, in bytes. Reading a hole would fill the page cache with
/// zeroes.
///
/// # Errors
///
/// The file system does not report holes.
pub(crate) fn data_extents(file: &File) -> std::io::Result<Vec<Range<u64>>> {
    let (mut extents, mut at) = (Vec::new(), 0);
    loop {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // There is no more data.
            Err(Errno::NXIO) => return Ok(extents),
            Err(error) => return Err(error.into()),
        };
        at = rustix::fs::seek(file, SeekFrom::Hole(start))?;
        extents.push(start..at);
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
    fn holes_are_no_data() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("disk.img");
        let mut file = File::create(&path).expect("file");
        file.set_len(64 << 20).expect("sparse");
        file.write_all(&[1; 1 << 20]).expect("written");
        file.sync_all().expect("written");
        let extents = data_extents(&file).expect("known");
        // The file system may have no holes.
        let length: u64 = extents.iter().map(|extent| extent.end - extent.start).sum();
        assert!(extents.first().is_some_and(|first| first.start == 0), "{extents:?}");
        assert!((1 << 20..=64 << 20).contains(&length), "{extents:?}");
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
