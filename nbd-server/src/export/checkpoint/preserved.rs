//! The old content of parts that were overwritten since a checkpoint.

use std::cell::RefCell;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use nbd_proto::wire::{AllocationFlags, MetaContextName};

use super::granules::Granules;
use super::log::{Found, Log, PART_LEN_MAX};
use crate::error::system_words;
use crate::export::{Export, ExportError, Holes, TryRead};

/// Longest part that is copied at a time, in bytes.
const RUN_LEN: u64 = 1 << 20;
/// Longest part that is copied for a writer that cannot wait, in bytes.
const PROMPT_LEN: u64 = 256 << 10;
/// The number of extents that are queried at a time.
const EXTENTS: usize = 256;

thread_local! {
    /// The buffer for copies.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Whether the writer can wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// It waits for the disk and for other threads.
    Waits,
    /// It must not wait, because it is a connection's task.
    Never,
}

/// Copies of old content, and the places that have any.
///
/// The first change of a granule copies it here and sets its bit; only then does the change begin.
/// So bytes read from the disk are old if the bit is not set *after* the read.
pub(super) struct Preserved {
    pub(super) granules: Granules,
    /// Long parts are at the disk's offsets, and the log starts at the disk's length.
    file: File,
    /// Short parts.
    log: Log,
    /// Granules that are being copied.
    claims: Mutex<Vec<Range<u64>>>,
    released: Condvar,
    /// The reason why the old content is incomplete, if it is.
    failure: OnceLock<String>,
    ended: AtomicBool,
    knows_zeroes: bool,
}

impl Preserved {
    /// Creates the state without copies. The file becomes sparse and as long as the disk.
    pub(super) fn new(disk: &dyn Export, file: File) -> std::io::Result<Self> {
        let info = disk.info();
        let granules = Granules::new(info.size, u64::from(info.block_sizes.minimum()));
        let mut log = Log::new(info.size, granules.len());
        if file.set_len(log.end()).is_err() {
            log.close();
            file.set_len(info.size)?;
        }
        Ok(Self {
            granules,
            file,
            log,
            claims: Mutex::default(),
            released: Condvar::new(),
            failure: OnceLock::new(),
            ended: AtomicBool::new(false),
            knows_zeroes: info.meta_contexts.contains(&MetaContextName::base_allocation()),
        })
    }

    /// Copies the granules that a change will touch, unless they were copied before; false if that
    /// would have to wait and `patience` forbids it.
    ///
    /// If a copy fails, the view is lost; the change is made nevertheless.
    pub(super) fn preserve(
        &self,
        disk: &dyn Export,
        offset: u64,
        length: u64,
        patience: Patience,
    ) -> bool {
        let touched = self.granules.touched(offset, length);
        let mut at = touched.start;
        while at < touched.end {
            if self.failure.get().is_some() {
                return true;
            }
            let (set, end) = self.granules.run(&(at..touched.end));
            if set {
                at = end;
                continue;
            }
            if patience == Patience::Never && (end - at) * self.granules.len() > PROMPT_LEN {
                return false;
            }
            let run = at..end.min(at + (RUN_LEN / self.granules.len()).max(1));
            if end > run.end && patience == Patience::Waits && self.skip_zeroes(disk, &(at..end)) {
                continue;
            }
            match self.copy(disk, run.clone(), patience) {
                Ok(true) => at = run.end,
                Ok(false) => return false,
                Err(why) => self.fail(why),
            }
        }
        true
    }

    /// Marks the zeroes at the start of a long run without reading them; false if there are none.
    fn skip_zeroes(&self, disk: &dyn Export, run: &Range<u64>) -> bool {
        if !self.knows_zeroes {
            return false;
        }
        let (offset, length) = self.granules.bytes(run);
        let context = MetaContextName::base_allocation();
        let Ok(found) = disk.block_status(&context, offset, length, EXTENTS) else { return false };
        let mut at = offset;
        let mut first = true;
        for extent in found {
            let zero = extent.flags & AllocationFlags::STATE_ZERO.bits() != 0;
            if first && !zero {
                return false;
            }
            first = false;
            if zero {
                // A change of one of these in between has set its bit before.
                self.granules.set(&self.granules.inside(at, extent.length));
            }
            at = at.saturating_add(extent.length);
        }
        // The first extent may be smaller than a granule.
        self.granules.run(run).0
    }

    /// Copies a run of granules, or waits until others have; false if that would have to wait and
    /// `patience` forbids it.
    fn copy(&self, disk: &dyn Export, run: Range<u64>, patience: Patience) -> Result<bool, String> {
        let Some(_claim) = self.claim(&run, patience) else { return Ok(false) };
        // Others may have copied a part before the claim.
        let mut at = run.start;
        while at < run.end {
            let (set, end) = self.granules.run(&(at..run.end));
            if !set && !self.copy_claimed(disk, at..end, patience)? {
                return Ok(false);
            }
            at = end;
        }
        Ok(true)
    }

    fn copy_claimed(
        &self,
        disk: &dyn Export,
        run: Range<u64>,
        patience: Patience,
    ) -> Result<bool, String> {
        let (offset, length) = self.granules.bytes(&run);
        BUFFER.with_borrow_mut(|buffer| {
            // At most RUN_LEN or one granule.
            buffer.resize(length as usize, 0);
            let read = match patience {
                Patience::Waits => disk.read_at(offset, buffer).map(|()| TryRead::Complete),
                Patience::Never => disk.try_read_at(offset, buffer, Holes::AsData),
            };
            match read {
                Ok(TryRead::Complete) => {}
                Ok(TryRead::WouldBlock | TryRead::Sparse) => return Ok(false),
                // A writer that can wait finds out.
                Err(_) if patience == Patience::Never => return Ok(false),
                Err(error) => return Err(format!("cannot read at offset {offset}: {error}")),
            }
            // The file is zero where nothing was written.
            if buffer.iter().any(|&byte| byte != 0) {
                self.keep(&run, offset, buffer).map_err(|error| {
                    format!("cannot copy overwritten data: {}", system_words(&error))
                })?;
            }
            self.granules.set(&run);
            Ok(true)
        })
    }

    fn keep(&self, run: &Range<u64>, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        if bytes.len() <= PART_LEN_MAX && self.log.append(&self.file, run, bytes)? {
            return Ok(());
        }
        self.file.write_all_at(bytes, offset)
    }

    fn claim(&self, run: &Range<u64>, patience: Patience) -> Option<Claim<'_>> {
        let mut claims = self.claims();
        while claims.iter().any(|other| other.start < run.end && run.start < other.end) {
            if patience == Patience::Never {
                return None;
            }
            claims = self.released.wait(claims).unwrap_or_else(PoisonError::into_inner);
        }
        claims.push(run.clone());
        Some(Claim { preserved: self, start: run.start })
    }

    fn claims(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, why: String) {
        tracing::error!(%why, "a point-in-time view is lost; the disk itself is not affected");
        // Another failure may have come first.
        let _ = self.failure.set(why);
    }

    /// The reason why the view is lost, if it is.
    pub(super) fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Reads copies.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        self.read_parts(offset, buffer).map_err(|error| {
            tracing::error!(%error, "cannot read copied data");
            ExportError::new(nbd_proto::wire::Errno::EIO, "cannot read copied data")
        })
    }

    fn read_parts(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let mut run = self.granules.touched(offset, buffer.len() as u64);
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let found = self.log.find(&run);
            let count = match &found {
                Found::Here(slots) => slots.len() as u64,
                Found::Elsewhere(count) => *count,
            };
            let (start, length) = self.granules.bytes(&(run.start..run.start + count));
            let part_len = rest.len().min((start + length - at) as usize);
            let (part, behind) = rest.split_at_mut(part_len);
            match found {
                Found::Here(slots) => {
                    self.log.read(&self.file, slots.start, (at - start) as usize, part)?;
                }
                Found::Elsewhere(_) => self.file.read_exact_at(part, at)?,
            }
            run.start += count;
            at += part_len as u64;
            rest = behind;
        }
        Ok(())
    }

    /// Ends the view: nothing is copied any more.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }
}

/// Granules that one thread copies; released when dropped.
struct Claim<'a> {
    preserved: &'a Preserved,
    start: u64,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        // Claims do not overlap: the start tells them apart.
        self.preserved.claims().retain(|claim| claim.start != self.start);
        self.preserved.released.notify_all();
    }
}
