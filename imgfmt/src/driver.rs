//! The trait that each image format implements. [`Image`](crate::Image) checks requests and calls it.

use std::fmt;

use crate::error::Result;
use crate::extent::ExtentList;
use crate::mapping::{Holes, Lease, Lookup};
use crate::qcow2::Qcow2;
use crate::storage::{Capabilities, Durability, Speed, Storage, TryRead, TryWrite, ZeroMode};
use crate::units::{GuestOffset, GuestRange};

/// An open image of one format. Every range handed in lies within [`size`](Self::size) and is not
/// empty, and nothing that changes the image is called on one opened read-only.
pub(crate) trait Driver: Send + Sync + fmt::Debug {
    fn size(&self) -> u64;
    fn capabilities(&self) -> Capabilities;
    fn read_at(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()>;
    /// Reads if that needs no waiting. With [`Holes::Told`] it gives up as soon as it meets one.
    fn try_read_at(&self, offset: GuestOffset, buffer: &mut [u8], holes: Holes) -> Result<TryRead>;
    fn write_at(&self, offset: GuestOffset, data: &[u8], durability: Durability) -> Result<()>;
    /// Writes if that needs neither waiting nor new space; says whether it did.
    fn try_write_at(&self, offset: GuestOffset, data: &[u8]) -> Result<TryWrite>;
    /// Writes whole clusters, compressed where the format can.
    fn write_compressed(&self, offset: GuestOffset, data: &[u8]) -> Result<()> {
        self.write_at(offset, data, Durability::Cached)
    }
    fn write_zeroes(
        &self,
        range: GuestRange,
        mode: ZeroMode,
        speed: Speed,
        durability: Durability,
    ) -> Result<()>;
    fn discard(&self, range: GuestRange, durability: Durability) -> Result<()>;
    fn flush(&self) -> Result<()>;
    /// Leaves the image in the state in which it should be found. Nothing is changed afterwards.
    fn close(&self) -> Result<()> {
        Ok(())
    }
    fn cache(&self, range: GuestRange) -> Result<()>;
    /// Appends extents from the start of `range` on until its end or until the list wants no more.
    fn extents(&self, range: GuestRange, list: &mut ExtentList) -> Result<()>;
    /// `None` if the lookup may not read what it would have to.
    fn map_read(&self, range: GuestRange, holes: Holes, lookup: Lookup) -> Result<Option<Lease>>;
    /// The storage whose bytes are the disk's, one to one and for ever, if there is one.
    fn raw_storage(&self) -> Option<&dyn Storage> {
        None
    }
    /// Changes the size of the disk; what is added reads as zero.
    fn resize(&mut self, size: u64) -> Result<()>;
    /// The image below this one.
    fn backing(&self) -> Option<&dyn Driver> {
        None
    }
    /// The image as a qcow2 image, for what only those have.
    fn as_qcow2(&self) -> Option<&Qcow2> {
        None
    }
    /// As [`as_qcow2`](Self::as_qcow2), to change it.
    fn as_qcow2_mut(&mut self) -> Option<&mut Qcow2> {
        None
    }
}
