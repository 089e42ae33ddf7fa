//! The qcow2 image as a [`Layer`].

use crate::error::{Error, Result};
use crate::layer::{Backing, Layer, Walk, WritableLayer};
use crate::lease::Lease;
use crate::mapping::{Encoded, Lookup, Mapped};
use crate::qcow2::image::Qcow2;
use crate::qcow2::map::lookup::span;
use crate::qcow2::on_disk::l2::Subcluster;
use crate::storage::{Capabilities, Durability, Speed, TryWrite, ZeroMode};
use crate::units::{GuestOffset, GuestRange, HostOffset};
use crate::write_map::WriteMap;

impl Layer for Qcow2 {
    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, range: GuestRange, walk: &mut Walk<'_>) -> Result<Mapped> {
        self.map_range(range, walk)
    }

    fn decode(&self, encoded: Encoded, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        self.read_encoded(encoded, offset, buffer)
    }

    fn kept_for_zeroes(&self, offset: GuestOffset) -> Result<(Option<HostOffset>, u64)> {
        let geometry = self.geometry();
        let (in_cluster, unit) = (geometry.in_cluster(offset), geometry.subcluster_size());
        let length = unit - in_cluster % unit;
        let Some(Some(table)) = self.mapping.table(offset, Lookup::MayRead)? else {
            return Ok((None, length));
        };
        let cluster = self.mapping.decode(&table, offset)?;
        let content = cluster.content(geometry, (in_cluster / unit) as u32);
        let kept = cluster.host.filter(|_| content == Subcluster::Zero);
        Ok((kept.map(|host| host + in_cluster), length))
    }

    fn lacks(&self, range: GuestRange, lookup: Lookup) -> Result<Option<bool>> {
        let (mut position, end) = (range.offset(), range.end());
        while position < end {
            let Some(piece) = self.mapping.piece(position, end, lookup)? else { return Ok(None) };
            if piece.content != Subcluster::Unallocated {
                return Ok(Some(false));
            }
            position = piece.range.end();
        }
        Ok(Some(true))
    }

    fn backing(&self) -> Option<&Backing> {
        self.backing.fixed()
    }

    fn lease(&self) -> Option<Lease> {
        self.clusters.lease()
    }

    fn io_error(
        &self,
        operation: &'static str,
        error: std::io::Error,
        offset: GuestOffset,
    ) -> Error {
        self.metadata.io(operation, error, offset)
    }
}

impl WritableLayer for Qcow2 {
    fn capabilities(&self) -> Capabilities {
        let cluster_size = self.geometry().subcluster_size() as u32;
        let can_map = self.mapping.format.version >= 3 || !self.names_backing();
        Capabilities {
            preferred_size: cluster_size.max(4096),
            minimum_size: 1,
            fast_zero: can_map,
            discard: can_map,
            ..self.data.capabilities()
        }
    }

    fn write_at(&self, offset: GuestOffset, data: &[u8], durability: Durability) -> Result<()> {
        self.metadata.refuse_if_corrupt()?;
        let recorded = self.bitmaps.before_change(self, span_at(offset, data.len()))?;
        self.write_range(offset, data)?;
        drop(recorded);
        self.flush_if(durability)
    }

    fn try_write_at(&self, offset: GuestOffset, data: &[u8]) -> Result<TryWrite> {
        self.metadata.refuse_if_corrupt()?;
        let Ok(_recorded) = self.bitmaps.try_before_change(span_at(offset, data.len())) else {
            return Ok(TryWrite::WouldBlock);
        };
        match self.try_write_range(offset, data)? {
            true => Ok(TryWrite::Complete),
            false => Ok(TryWrite::WouldBlock),
        }
    }

    fn map_write(&self, offset: GuestOffset, length: u64) -> Result<Option<WriteMap>> {
        self.metadata.refuse_if_corrupt()?;
        if self.flusher().is_under_pressure() {
            return Ok(None);
        }
        self.map_in_place(span(offset.bytes(), offset.bytes() + length))
    }

    fn write_compressed(&self, offset: GuestOffset, data: &[u8]) -> Result<()> {
        self.metadata.refuse_if_corrupt()?;
        let _recorded = self.bitmaps.before_change(self, span_at(offset, data.len()))?;
        let size = self.geometry().cluster_size();
        let mut offset = offset;
        for part in data.chunks(size as usize) {
            self.write_compressed_cluster(offset, part)?;
            offset = GuestOffset::new(offset.bytes() + part.len() as u64);
        }
        Ok(())
    }

    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode, speed: Speed) -> Result<()> {
        self.metadata.refuse_if_corrupt()?;
        let _recorded = self.bitmaps.before_change(self, range)?;
        self.zero_range(range, mode, speed)
    }

    fn discard(&self, range: GuestRange) -> Result<()> {
        self.metadata.refuse_if_corrupt()?;
        let _recorded = self.bitmaps.before_change(self, range)?;
        self.discard_range(range)
    }

    fn flush(&self) -> Result<()> {
        self.flusher().flush_for_caller()
    }

    fn mark_incomplete(&self, is_incomplete: bool) -> Result<()> {
        self.metadata.mark_incomplete(is_incomplete)
    }

    fn close(&self) -> Result<()> {
        self.metadata.report_failed(self.close_writer())
    }

    fn resize(&mut self, size: u64) -> Result<()> {
        Self::resize(self, size)
    }
}

/// The range of `length` bytes from `offset` on.
fn span_at(offset: GuestOffset, length: usize) -> GuestRange {
    span(offset.bytes(), offset.bytes() + length as u64)
}
