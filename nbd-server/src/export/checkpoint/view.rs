//! The disk as it was at a checkpoint.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use nbd_proto::wire::{BlockDescriptor, Errno, MetaContextName, TransmissionFlags};

use super::preserved::Preserved;
use crate::export::{
    Content, Descriptors, Export, ExportError, ExportInfo, FastExport, Holes, Lookup, Mapped,
    MayBlock, Operation, ReadMap, TryRead,
};

/// Answers a context of a view: called with offset and length in bytes and the maximum number of
/// descriptors, under the same rules as [`Export::block_status`].
pub type StatusFn =
    dyn Fn(u64, u64, usize) -> Result<Vec<BlockDescriptor>, ExportError> + Send + Sync;

/// The read-only state of a disk at the moment when
/// [`Checkpointed::begin`](super::Checkpointed::begin) created this view.
///
/// Reads do not delay writes: they read the disk itself and check afterwards that it was not
/// changed there. After the end of the checkpoint every request fails with EIO.
pub struct PointInTimeView {
    disk: Arc<dyn Export>,
    preserved: Arc<Preserved>,
    contexts: Vec<(MetaContextName, Box<StatusFn>)>,
    info: ExportInfo,
}

impl PointInTimeView {
    pub(super) fn new(disk: Arc<dyn Export>, preserved: Arc<Preserved>) -> Self {
        let of_disk = disk.info();
        let mut info = ExportInfo::new(of_disk.size);
        info.flags |= TransmissionFlags::READ_ONLY | TransmissionFlags::CAN_MULTI_CONN;
        info.block_sizes = of_disk.block_sizes;
        let allocation = MetaContextName::base_allocation();
        info.meta_contexts
            .extend(of_disk.meta_contexts.into_iter().filter(|context| *context == allocation));
        Self { disk, preserved, contexts: Vec::new(), info }
    }

    /// Adds a context, such as the bits of a bitmap frozen at the checkpoint.
    #[must_use]
    pub fn with_context(mut self, name: MetaContextName, status: Box<StatusFn>) -> Self {
        self.info.meta_contexts.push(name.clone());
        self.contexts.push((name, status));
        self
    }

    /// Fails if read bytes may differ from the disk at the checkpoint.
    fn check(&self) -> Result<(), ExportError> {
        if self.preserved.has_ended() {
            return Err(ExportError::new(Errno::EIO, "the checkpoint has ended"));
        }
        if self.preserved.failure().is_some() {
            let why = "the view is lost: overwritten data could not be copied";
            return Err(ExportError::new(Errno::EIO, why));
        }
        Ok(())
    }

    /// Replaces those parts of a buffer that were copied meanwhile with their copies.
    fn replace_preserved(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        // Everything read before this line is checked against the bits after it.
        fence(Ordering::SeqCst);
        let granules = &self.preserved.granules;
        let end = offset + buffer.len() as u64;
        let touched = granules.touched(offset, buffer.len() as u64);
        let mut at = touched.start;
        while at < touched.end {
            let (set, run_end) = granules.run(&(at..touched.end));
            if set {
                let (start, length) = granules.bytes(&(at..run_end));
                let (from, to) = (start.max(offset), (start + length).min(end));
                let part = (from - offset) as usize..(to - offset) as usize;
                self.preserved.read(from, &mut buffer[part])?;
            }
            at = run_end;
        }
        self.check()
    }

    /// The allocation of a range of granules that are all copied or all not.
    fn allocation(
        &self,
        offset: u64,
        length: u64,
        max_count: usize,
        out: &mut Descriptors,
    ) -> Result<u64, ExportError> {
        let granules = &self.preserved.granules;
        let touched = granules.touched(offset, length);
        let (set, run_end) = granules.run(&touched);
        let (start, run_length) = granules.bytes(&(touched.start..run_end));
        let length = (start + run_length).min(offset + length) - offset;
        if set {
            // Overwritten parts are rarely holes; "data" is always correct.
            return Ok(if out.push(length, 0) { length } else { 0 });
        }
        let context = MetaContextName::base_allocation();
        let found = self.disk.block_status(&context, offset, length, max_count)?;
        fence(Ordering::SeqCst);
        // A part that was changed meanwhile may have become a hole.
        let (set, end) = granules.run(&touched);
        if set {
            return self.allocation(offset, length, max_count, out);
        }
        let known = (granules.bytes(&(touched.start..end)).0
            + granules.bytes(&(touched.start..end)).1)
            .min(offset + length)
            - offset;
        let mut pushed = 0;
        for extent in found {
            let part = extent.length.min(known - pushed);
            if part == 0 || !out.push(part, extent.flags) {
                break;
            }
            pushed += part;
        }
        Ok(pushed)
    }
}

impl Export for PointInTimeView {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        self.check()?;
        let touched = self.preserved.granules.touched(offset, buffer.len() as u64);
        // Copied parts need not be read from the disk as well.
        if !self.preserved.granules.all_set(&touched) {
            self.disk.read_at(offset, buffer)?;
        }
        self.replace_preserved(offset, buffer)
    }

    fn block_status(
        &self,
        context: &MetaContextName,
        offset: u64,
        length: u64,
        max_count: usize,
    ) -> Result<Vec<BlockDescriptor>, ExportError> {
        self.check()?;
        if let Some((_, status)) = self.contexts.iter().find(|(name, _)| name == context) {
            let found = status(offset, length, max_count)?;
            self.check()?;
            return Ok(found);
        }
        if *context != MetaContextName::base_allocation() {
            return Err(ExportError::new(Errno::EINVAL, "the view has no such context"));
        }
        let mut status = Descriptors::new(max_count);
        let end = offset.saturating_add(length);
        let mut at = offset;
        while at < end {
            let found = self.allocation(at, end - at, max_count, &mut status)?;
            if found == 0 {
                break;
            }
            at += found;
        }
        self.check()?;
        Ok(status.into_vec())
    }

    fn fast(&self) -> Option<&dyn FastExport> {
        Some(self)
    }
}

impl FastExport for PointInTimeView {
    fn try_read_at(
        &self,
        offset: u64,
        buffer: &mut [u8],
        holes: Holes,
    ) -> Result<TryRead, ExportError> {
        self.check()?;
        let granules = &self.preserved.granules;
        let touched = granules.touched(offset, buffer.len() as u64);
        let is_as_it_was = || granules.run(&touched) == (false, touched.end);
        if !is_as_it_was() {
            return Ok(TryRead::WouldBlock);
        }
        let read = self.disk.try_read_at(offset, buffer, holes)?;
        // More parts may have been copied during the read.
        fence(Ordering::SeqCst);
        self.check()?;
        Ok(if is_as_it_was() { read } else { TryRead::WouldBlock })
    }

    /// Overwritten parts are rarely holes: if anything was overwritten in the range, all of it is
    /// data. Bytes of a file are not returned, because they can change.
    fn map_read(
        &self,
        offset: u64,
        length: usize,
        holes: Holes,
        lookup: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        self.check()?;
        let granules = &self.preserved.granules;
        let touched = granules.touched(offset, length as u64);
        let is_as_it_was = || granules.run(&touched) == (false, touched.end);
        if !is_as_it_was() {
            map.push_export(length);
            return Ok(Mapped::Complete);
        }
        let mut of_disk = ReadMap::new();
        let mapped = self.disk.map_read(offset, length, holes, lookup, &mut of_disk)?;
        if matches!(mapped, Mapped::WouldBlock | Mapped::HolesUnknown) {
            return Ok(mapped);
        }
        fence(Ordering::SeqCst);
        self.check()?;
        if !is_as_it_was() {
            map.push_export(length);
            return Ok(Mapped::Complete);
        }
        for part in of_disk.segments() {
            match &part.content {
                Content::Zero => map.push_zero(part.length),
                Content::Bytes(bytes) => map.push_bytes(bytes.clone()),
                Content::File(_) | Content::Export => map.push_export(part.length),
            }
        }
        Ok(mapped)
    }

    fn may_block(&self, _: Operation) -> MayBlock {
        MayBlock::Yes
    }
}

impl fmt::Debug for PointInTimeView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PointInTimeView").field("info", &self.info).finish_non_exhaustive()
    }
}
