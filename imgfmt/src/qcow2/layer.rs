//! The qcow2 image as a [`Driver`].

use crate::driver::Driver;
use crate::error::Result;
use crate::extent::ExtentList;
use crate::mapping::{Holes, Lease, Lookup};
use crate::qcow2::image::Qcow2;
use crate::qcow2::map::lookup::span;
use crate::storage::{Capabilities, Durability, Speed, TryRead, TryWrite, ZeroMode};
use crate::units::{GuestOffset, GuestRange};

impl Driver for Qcow2 {
    fn size(&self) -> u64 {
        self.size
    }

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

    fn read_at(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let _lease = self.clusters.lease();
        self.read_range(offset, buffer)
    }

    fn try_read_at(&self, offset: GuestOffset, buffer: &mut [u8], holes: Holes) -> Result<TryRead> {
        let _lease = self.clusters.lease();
        self.try_read_range(offset, buffer, holes)
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

    fn write_zeroes(
        &self,
        range: GuestRange,
        mode: ZeroMode,
        speed: Speed,
        durability: Durability,
    ) -> Result<()> {
        self.metadata.refuse_if_corrupt()?;
        let recorded = self.bitmaps.before_change(self, range)?;
        self.zero_range(range, mode, speed)?;
        drop(recorded);
        self.flush_if(durability)
    }

    fn discard(&self, range: GuestRange, durability: Durability) -> Result<()> {
        self.metadata.refuse_if_corrupt()?;
        let recorded = self.bitmaps.before_change(self, range)?;
        self.discard_range(range)?;
        drop(recorded);
        self.flush_if(durability)
    }

    fn flush(&self) -> Result<()> {
        self.flush_for_caller()
    }

    fn close(&self) -> Result<()> {
        self.close_writer()
    }

    fn cache(&self, range: GuestRange) -> Result<()> {
        let lease = self.map_read(range, Holes::AsData, Lookup::MayRead)?;
        for mapping in lease.iter().flat_map(Lease::mappings) {
            if let crate::Mapping::File { range, storage, offset } = mapping {
                let ahead = storage.readahead(*offset, range.length());
                ahead.map_err(|error| self.metadata.io("read ahead in", error, range.offset()))?;
            }
        }
        Ok(())
    }

    fn extents(&self, range: GuestRange, list: &mut ExtentList) -> Result<()> {
        self.push_extents(range, list)
    }

    fn map_read(&self, range: GuestRange, holes: Holes, lookup: Lookup) -> Result<Option<Lease>> {
        let lease = self.clusters.lease();
        let mut mappings = Vec::new();
        if !self.push_mappings(range, holes, lookup, &mut mappings)? {
            return Ok(None);
        }
        Ok(Some(match lease {
            Some(lease) => Lease::guarded(mappings, lease),
            None => Lease::fixed(mappings),
        }))
    }

    fn resize(&mut self, size: u64) -> Result<()> {
        Self::resize(self, size)
    }

    fn backing(&self) -> Option<&dyn Driver> {
        self.backing.as_ref().map(|backing| &*backing.driver)
    }

    fn as_qcow2(&self) -> Option<&Self> {
        Some(self)
    }

    fn as_qcow2_mut(&mut self) -> Option<&mut Self> {
        Some(self)
    }
}

impl Qcow2 {
    fn flush_if(&self, durability: Durability) -> Result<()> {
        match durability {
            Durability::Cached => Ok(()),
            Durability::Fua => self.flush_for_caller(),
        }
    }
}

/// The range of `length` bytes from `offset` on.
fn span_at(offset: GuestOffset, length: usize) -> GuestRange {
    span(offset.bytes(), offset.bytes() + length as u64)
}
