//! Whether the page cache has the files of a block as the row needs it.
//!
//! A block whose files were cached in another way than those of the row's other blocks, or no
//! longer at its end, is a finding of the benchmark, not a number.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::cache_state::CacheState;
use super::sample::Sample;

/// The smallest share of a file in the page cache that counts as the whole file.
const WHOLE: f64 = 0.99;

/// The files of a block, with their states at its beginning.
#[derive(Debug, Default)]
pub(crate) struct Files(RefCell<Vec<(PathBuf, CacheState, Kept)>>);

/// What the block does to a file's place in the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    /// Nothing.
    Yes,
    /// The block changes what is cached: by reads of uncached data, new parts, or writes that
    /// bypass the page cache.
    No,
}

impl Files {
    /// Begins a block without files.
    pub(crate) fn forget(&self) {
        self.0.borrow_mut().clear();
    }

    /// Adds a file that is in the page cache as a whole.
    ///
    /// # Errors
    ///
    /// It is not, or the system does not report it.
    pub(crate) fn expect_whole(&self, path: &Path, kept: Kept) -> Result<()> {
        let state = self.add(path, kept)?;
        if state.cached < WHOLE {
            bail!("the page cache has only {} of {}", state.describe(), path.display());
        }
        Ok(())
    }

    /// Adds a file of which the page cache may have only a part, and returns the state.
    ///
    /// # Errors
    ///
    /// The system does not report its pages.
    pub(crate) fn add(&self, path: &Path, kept: Kept) -> Result<CacheState> {
        let state = CacheState::of(path)?;
        self.0.borrow_mut().push((path.to_owned(), state, kept));
        Ok(state)
    }

    /// The state at the beginning, if there are files.
    fn state(&self) -> Option<CacheState> {
        self.0.borrow().iter().map(|(_, state, _)| *state).reduce(CacheState::and)
    }

    /// Fails if a file that had to stay in the page cache is cached in another way.
    fn check(&self) -> Result<()> {
        for (path, before, kept) in self.0.borrow().iter() {
            let after = CacheState::of(path)?;
            if *kept == Kept::Yes && after.differs_from(*before) {
                let (before, after) = (before.describe(), after.describe());
                let path = path.display();
                bail!("the page cache changed during the block: {path} {before}, then {after}");
            }
        }
        Ok(())
    }
}

/// The states in which the rows were first measured.
#[derive(Debug, Default)]
pub(crate) struct PageCaches(HashMap<String, CacheState>);

impl PageCaches {
    /// Puts the state of a block's files into its sample.
    ///
    /// # Errors
    ///
    /// It is not that of the row, or it has changed.
    pub(crate) fn check(&mut self, row: &str, files: &Files, mut sample: Sample) -> Result<Sample> {
        files.check()?;
        sample.page_cache = files.state();
        if let Some(state) = sample.page_cache {
            let first = *self.0.entry(row.to_owned()).or_insert(state);
            if state.differs_from(first) {
                let (state, first) = (state.describe(), first.describe());
                bail!("the page cache had {state}, but {first} in the first block of the row");
            }
        }
        Ok(sample)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::DataFile;
    use crate::options::PageCache;

    const SAMPLE: Sample = Sample {
        throughput: 1.0,
        p99_us: None,
        client_busy: None,
        cpu_us_per_work: 1.0,
        peak_memory_kib: 1.0,
        page_cache: None,
    };

    fn drop_from_cache(path: &Path) {
        let file = std::fs::File::open(path).expect("file");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("advice");
    }

    #[test]
    fn block_whose_file_leaves_the_page_cache_is_no_number() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("directory");
        let path = directory.path().join("disk.img");
        let file = DataFile::create(path.clone(), 1 << 20, PageCache::Pages).expect("file");
        if CacheState::of(&path).expect("known").cached > 0.0 {
            eprintln!("skipped: this file system does not drop files from memory");
            return;
        }
        let (files, mut caches) = (Files::default(), PageCaches::default());
        assert!(files.expect_whole(&path, Kept::Yes).is_err(), "nothing is cached");
        files.forget();
        file.settle_and_warm().expect("readable");
        files.expect_whole(&path, Kept::Yes).expect("cached");
        let sample = caches.check("row", &files, SAMPLE).expect("unchanged");
        assert!(sample.page_cache.is_some_and(|state| state.cached > WHOLE));

        drop_from_cache(&path);
        let error = caches.check("row", &files, SAMPLE).expect_err("gone");
        assert!(error.to_string().contains("changed during the block"), "{error}");

        // The next server of the row would find another state; another row may.
        files.forget();
        files.add(&path, Kept::No).expect("known");
        let error = caches.check("row", &files, SAMPLE).expect_err("another state");
        assert!(error.to_string().contains("first block of the row"), "{error}");
        assert!(caches.check("other", &files, SAMPLE).is_ok());
    }
}
