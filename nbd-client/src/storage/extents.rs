//! Block status of exports, for images, with a cache.

use std::io;
use std::ops::Range;
use std::sync::PoisonError;

use imgfmt::ExtentKind;
use imgfmt::storage::StorageExtent;
use nbd_proto::transmission;
use nbd_proto::wire::{AllocationFlags, BlockDescriptor, MetaContextName};

use super::{ExportStorage, Known, io_error};

impl ExportStorage {
    /// Returns the status of the start of a range, in bytes, in a selected context: at least one
    /// descriptor, at most the range.
    ///
    /// # Errors
    ///
    /// If the server reports none, or the request fails.
    pub fn status(
        &self,
        context: &MetaContextName,
        range: Range<u64>,
    ) -> io::Result<Vec<BlockDescriptor>> {
        let asked = self.aligned(range.start, range.end.saturating_sub(range.start));
        let mut position = asked.start;
        let statuses = self.client.block_status(asked, transmission::ExtentLimit::Many);
        let found = statuses.map_err(io_error)?.into_iter().find(|(name, _)| name == context);
        let mut inside = Vec::new();
        for descriptor in found.map(|(_, descriptors)| descriptors).unwrap_or_default() {
            let begin = position.max(range.start);
            position = position.saturating_add(descriptor.length);
            if let Some(length @ 1..) = position.min(range.end).checked_sub(begin) {
                inside.push(BlockDescriptor { length, ..descriptor });
            }
        }
        match inside.is_empty() {
            true => Err(io::Error::other("the server gave no status")),
            false => Ok(inside),
        }
    }

    /// The kind of the bytes at `offset`, and their number within `length` bytes; data if the
    /// server reports none.
    pub(super) fn extent_at(&self, offset: u64, length: u64) -> io::Result<StorageExtent> {
        let all_data = StorageExtent { length, kind: ExtentKind::Data };
        if !self.reports_extents || offset >= self.size() {
            return Ok(all_data);
        }
        let mut known = self.extents.lock().unwrap_or_else(PoisonError::into_inner);
        let covers = |known: &&Known| known.start <= offset && offset < known.end;
        let mut found = known.iter().find(covers).copied();
        if found.is_none() {
            *known = self.fetch(offset, length.min(self.size() - offset))?;
            found = known.iter().find(covers).copied();
        }
        Ok(found.map_or(all_data, |known| StorageExtent {
            length: (known.end - offset).min(length),
            kind: known.kind,
        }))
    }

    /// Queries the status at `offset` and after it.
    fn fetch(&self, offset: u64, length: u64) -> io::Result<Vec<Known>> {
        let asked = self.aligned(offset, length);
        let mut position = asked.start;
        let contexts = self.client.block_status(asked, transmission::ExtentLimit::Many);
        let base = MetaContextName::base_allocation();
        let found = contexts.map_err(io_error)?.into_iter().find(|(name, _)| *name == base);
        let descriptors = found.map(|(_, list)| list).unwrap_or_default();
        let known = descriptors.iter().map(|descriptor| {
            let flags = AllocationFlags::from_bits_truncate(descriptor.flags);
            let is_hole = flags.contains(AllocationFlags::STATE_HOLE);
            let kind = match flags.contains(AllocationFlags::STATE_ZERO) {
                true if is_hole => ExtentKind::Hole,
                true => ExtentKind::Zero,
                false => ExtentKind::Data,
            };
            let start = position;
            position = position.saturating_add(descriptor.length);
            Known { start, end: position, kind }
        });
        Ok(known.collect())
    }
}
