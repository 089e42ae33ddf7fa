//! What the page cache holds of a file, and in which units.
//!
//! The same request can cost the kernel ten times as much, depending on whether the page cache has
//! a file in single pages or in large folios. The kernel changes that while a program runs, because
//! it reclaims and reads ahead.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::data::data_extents;
use super::sys::MappedFile;

/// How many pages are examined for their units.
const SAMPLES: usize = 256;
/// Differences up to these are ignored: of the share in the page cache, and of the share in large
/// folios.
const CACHED_TOLERANCE: f64 = 0.02;
const LARGE_TOLERANCE: f64 = 0.1;

/// What the page cache holds of one file or several.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct CacheState {
    /// The share of the pages of the file, from 0 to 1. Holes have none.
    pub(crate) cached: f64,
    /// The share of those that are in folios of several pages; `None` if the system tells only the
    /// administrator.
    pub(crate) large: Option<f64>,
}

impl CacheState {
    /// Returns the present state of the file at `path`.
    ///
    /// # Errors
    ///
    /// The file cannot be opened, or the system does not report its pages.
    pub(crate) fn of(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        Self::of_file(&file).with_context(|| format!("the page cache of {}", path.display()))
    }

    fn of_file(file: &File) -> Result<Self> {
        let page_size = rustix::param::page_size();
        let (mut count, mut cached) = (0, Vec::new());
        for extent in data_extents(file)? {
            let start = extent.start - extent.start % page_size as u64;
            let length = usize::try_from(extent.end - start)?;
            let mapped = Rc::new(MappedFile::new(file, start, length)?);
            let pages = mapped.cached_pages(page_size)?;
            count += pages.len();
            let pages = pages.into_iter().enumerate().filter(|(_, is_cached)| *is_cached);
            cached.extend(pages.map(|(page, _)| (Rc::clone(&mapped), page * page_size)));
        }
        let samples = cached.iter().step_by(cached.len().div_ceil(SAMPLES).max(1));
        let large = share_in_large_folios(samples, page_size);
        let share = if count == 0 { 1.0 } else { cached.len() as f64 / count as f64 };
        Ok(Self { cached: share, large })
    }

    /// The state of both files together, where the worse of them counts.
    pub(crate) fn and(self, other: Self) -> Self {
        Self { cached: self.cached.min(other.cached), large: most(self.large, other.large) }
    }

    /// Whether a measurement in one of the states says nothing about the other.
    pub(crate) fn differs_from(self, other: Self) -> bool {
        let is_far = |a: f64, b: f64, tolerance| (a - b).abs() > tolerance;
        is_far(self.cached, other.cached, CACHED_TOLERANCE)
            || self.large.zip(other.large).is_some_and(|(a, b)| is_far(a, b, LARGE_TOLERANCE))
    }

    /// For the table and messages, such as `100 %, 3 % large`.
    pub(crate) fn describe(self) -> String {
        let percent = |share: f64| format!("{:.0} %", share * 100.0);
        match self.large {
            Some(large) => format!("{}, {} large", percent(self.cached), percent(large)),
            None => percent(self.cached),
        }
    }
}

fn most(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.max(b)),
        (a, b) => a.or(b),
    }
}

/// The share of `pages`, all of them in the page cache, that belong to folios of several pages.
/// Each page is given by its offset in a mapping. `None` if there are no pages, or if the system
/// does not report folios.
fn share_in_large_folios<'a>(
    pages: impl Iterator<Item = &'a (Rc<MappedFile>, usize)>,
    page_size: usize,
) -> Option<f64> {
    /// A page of a folio of several pages (`KPF_COMPOUND_HEAD` and `KPF_COMPOUND_TAIL`).
    const COMPOUND: u64 = 1 << 15 | 1 << 16;
    /// In an entry of pagemap: the page is in memory; and the bits of its number.
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let (page_map, flags) = (File::open("/proc/self/pagemap"), File::open("/proc/kpageflags"));
    let (page_map, flags) = (page_map.ok()?, flags.ok()?);
    #[expect(clippy::host_endian_bytes, reason = "the kernel's tables are in the machine's order")]
    let word = |file: &File, index: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, index * 8).ok()?;
        Some(u64::from_ne_bytes(bytes))
    };
    let (mut seen, mut large) = (0_u32, 0_u32);
    for (mapped, offset) in pages {
        let entry = word(&page_map, (mapped.touch(*offset) / page_size) as u64)?;
        let frame = entry & FRAME;
        if entry & PRESENT == 0 {
            continue;
        }
        // Hidden from everybody but the administrator.
        if frame == 0 {
            return None;
        }
        seen += 1;
        large += u32::from(word(&flags, frame)? & COMPOUND != 0);
    }
    (seen > 0).then(|| f64::from(large) / f64::from(seen))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::DataFile;
    use crate::options::PageCache;

    fn state(cached: f64, large: Option<f64>) -> CacheState {
        CacheState { cached, large }
    }

    #[test]
    fn a_file_that_was_read_is_cached_and_one_that_was_dropped_is_not() {
        // Not in memory only, as the directory for temporary files may be.
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("directory");
        let path = directory.path().join("disk.img");
        let file = DataFile::create(path.clone(), 4 << 20, PageCache::Pages).expect("file");
        let dropped = CacheState::of(&path).expect("known");
        file.settle_and_warm().expect("readable");
        let read = CacheState::of(&path).expect("known");
        assert!(read.cached > 0.99, "{read:?}");
        if dropped.cached > 0.0 {
            eprintln!("skipped in part: this file system does not drop files from memory");
        } else {
            assert!(read.differs_from(dropped));
        }
        assert!(read.large.is_none_or(|large| large < 0.5), "{read:?}");
    }

    #[test]
    fn small_differences_are_none() {
        let single = state(1.0, Some(0.0));
        assert!(!single.differs_from(state(0.99, Some(0.05))));
        assert!(!single.differs_from(state(1.0, None)));
        assert!(single.differs_from(state(0.9, Some(0.0))));
        assert!(single.differs_from(state(1.0, Some(0.9))));
        assert_eq!(single.and(state(0.5, Some(1.0))), state(0.5, Some(1.0)));
        assert_eq!(single.and(state(1.0, None)), single);
        assert_eq!(state(0.5, Some(1.0)).describe(), "50 %, 100 % large");
        assert_eq!(state(1.0, None).describe(), "100 %");
    }
}
