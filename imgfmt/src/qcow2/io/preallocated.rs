//! What the parts of the disk hold, and in which layer: the same answers as QEMU gives.

use std::sync::Arc;

use crate::error::Result;
use crate::extent::{EFFORT_OF_PIECE, Extent, ExtentKind, ExtentList};
use crate::qcow2::image::Qcow2;
use crate::qcow2::map::lookup::{Lookup, span};
use crate::qcow2::on_disk::l2::Content;
use crate::qcow2::on_disk::refcount::Refcounts;
use crate::qcow2::on_disk::words::read_words;
use crate::units::{GuestOffset, GuestRange, HostOffset};

impl Qcow2 {
    pub(in crate::qcow2) fn push_extents(
        &self,
        range: GuestRange,
        list: &mut ExtentList,
    ) -> Result<()> {
        self.mapping.for_each_piece(range, Lookup::MayRead, |piece| {
            list.tire(piece.entries + EFFORT_OF_PIECE);
            let kind = match piece.content {
                Content::Stored(host) if self.is_preallocated() => {
                    return Ok(self.push_file_extents(piece.range, host, list)? && !list.is_tired());
                }
                Content::Unallocated => {
                    return Ok(self.push_backing_extents(piece.range, list)? && !list.is_tired());
                }
                Content::Stored(_) | Content::Compressed(_) => ExtentKind::Data,
                Content::Zero => ExtentKind::Hole,
            };
            // A disk may be so large, or say the same for so long, that the end is hours away.
            Ok(list.push(Extent { range: piece.range, kind, depth: 1 }) && !list.is_tired())
        })?;
        Ok(())
    }

    /// Appends the extents of the layers below, one deeper than they are there.
    fn push_backing_extents(&self, range: GuestRange, list: &mut ExtentList) -> Result<bool> {
        let Some(backing) = &self.backing else {
            return Ok(list.push(Extent { range, kind: ExtentKind::Hole, depth: 0 }));
        };
        let inside = range.intersection(span(0, backing.size));
        if !inside.is_empty() {
            let mut below = list.below();
            backing.driver.extents(inside, &mut below)?;
            list.tired_by(&below);
            let mut position = inside.offset();
            for extent in below.into_vec() {
                position = extent.range.end();
                let depth = if extent.depth == 0 { 0 } else { extent.depth + 1 };
                if !list.push(Extent { depth, ..extent }) {
                    return Ok(false);
                }
            }
            if position < inside.end() {
                return Ok(false);
            }
        }
        // Behind the end of a shorter backing file its layer decides: zero.
        let behind = span(range.offset().bytes().max(backing.size), range.end().bytes());
        Ok(list.push(Extent { range: behind, kind: ExtentKind::Hole, depth: 2 }))
    }

    /// Appends the extents of data of which the file may have holes: allocated, and zero there.
    fn push_file_extents(
        &self,
        range: GuestRange,
        host: u64,
        list: &mut ExtentList,
    ) -> Result<bool> {
        let io = |error| self.metadata.io("look for holes in", error, range.offset());
        let file_length = self.data.len().map_err(io)?;
        let end = range.end().bytes();
        let mut position = range.offset().bytes();
        while position < end {
            let place = host + (position - range.offset().bytes());
            let rest = end - position;
            let (length, is_hole) = if place >= file_length {
                (rest, true)
            } else {
                let inside = rest.min(file_length - place);
                let found = self.data.next_extent(HostOffset::new(place), inside).map_err(io)?;
                (found.length.clamp(1, inside), found.kind == ExtentKind::Hole)
            };
            let kind = if is_hole { ExtentKind::Zero } else { ExtentKind::Data };
            if !list.push(Extent { range: span(position, position + length), kind, depth: 1 }) {
                return Ok(false);
            }
            position += length;
        }
        Ok(true)
    }

    /// Whether the image has clusters that were allocated but never written: then, and only then,
    /// it is worth asking the file system about them. Found out once, as QEMU does, by comparing
    /// the clusters in use with the space that the file takes up.
    pub(in crate::qcow2) fn is_preallocated(&self) -> bool {
        if let Some(known) = self.preallocated.get() {
            return *known;
        }
        // Refcounts that cannot be read are no reason to refuse the map.
        let answer = self.look_for_preallocation().unwrap_or(false);
        *self.preallocated.get_or_init(|| answer)
    }

    fn look_for_preallocation(&self) -> Result<bool> {
        let io = |error| self.metadata.io("find the size of", error, GuestOffset::new(0));
        let Some(allocated) = self.metadata.file.allocated_len().map_err(io)? else {
            return Ok(false);
        };
        let geometry = self.geometry();
        let real = allocated >> geometry.cluster_bits;
        let threshold = (real.saturating_mul(10) / 9).max(real.saturating_add(2));
        let file_clusters = geometry.clusters_of(self.metadata.file.len().map_err(io)?);
        if file_clusters < threshold {
            return Ok(false);
        }
        let words = u64::from(self.metadata.header().refcount_table_clusters)
            << (geometry.cluster_bits - 3);
        let table = read_words(
            &*self.metadata.file,
            self.metadata.header().refcount_table_offset,
            words as usize,
        )?;
        let mut refcounts = Refcounts::new(Arc::clone(&self.metadata.file), geometry, table);
        let (mut used, mut cluster) = (0, 0);
        // Every block takes up space: an image with more of them than space is damaged.
        for _ in 0..=real {
            let block_end = (cluster + geometry.block_entries()).min(file_clusters);
            while cluster < block_end {
                used += u64::from(refcounts.refcount(cluster)? > 0);
                cluster += 1;
            }
            if used >= threshold || cluster == file_clusters {
                return Ok(used >= threshold);
            }
        }
        Ok(false)
    }
}
