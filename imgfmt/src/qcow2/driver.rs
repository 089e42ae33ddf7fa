//! The qcow2 image as a [`Driver`].

use super::Qcow2;
use super::header::unsupported;
use crate::driver::Driver;
use crate::error::Result;
use crate::extent::ExtentList;
use crate::mapping::Lease;
use crate::storage::{Capabilities, Durability, Speed, TryRead, ZeroMode};
use crate::units::{GuestOffset, GuestRange};

impl Driver for Qcow2 {
    fn size(&self) -> u64 {
        self.size
    }

    fn capabilities(&self) -> Capabilities {
        let cluster_size = self.geometry().subcluster_size() as u32;
        Capabilities { preferred_size: cluster_size.max(4096), ..self.data.capabilities() }
    }

    fn read_at(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        self.read_range(offset, buffer)
    }

    fn try_read_at(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<TryRead> {
        self.try_read_range(offset, buffer)
    }

    fn write_at(&self, _: GuestOffset, _: &[u8], _: Durability) -> Result<()> {
        Err(unsupported("written"))
    }

    fn write_zeroes(&self, _: GuestRange, _: ZeroMode, _: Speed, _: Durability) -> Result<()> {
        Err(unsupported("written"))
    }

    fn discard(&self, _: GuestRange, _: Durability) -> Result<()> {
        Err(unsupported("written"))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn cache(&self, range: GuestRange) -> Result<()> {
        for mapping in self.map_read(range)?.mappings() {
            if let crate::Mapping::File { range, storage, offset } = mapping {
                let ahead = storage.readahead(*offset, range.length());
                ahead.map_err(|error| self.io("read ahead in", error, range.offset()))?;
            }
        }
        Ok(())
    }

    fn extents(&self, range: GuestRange, list: &mut ExtentList) -> Result<()> {
        self.push_extents(range, list)
    }

    fn map_read(&self, range: GuestRange) -> Result<Lease> {
        let mut mappings = Vec::new();
        self.push_mappings(range, &mut mappings)?;
        Ok(Lease::fixed(mappings))
    }
}
