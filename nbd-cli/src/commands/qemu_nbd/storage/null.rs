//! The drivers `null-co` and `null-aio`: a disk that discards all writes, for benchmarks.

use std::io;

use imgfmt::storage::StorageExtent;
use imgfmt::{Capabilities, Durability, ExtentKind, HostOffset, Speed, Storage, TryRead, ZeroMode};

/// Reads as zero, and discards every write.
#[derive(Debug)]
pub(in crate::commands::qemu_nbd) struct Null {
    size: u64,
}

impl Null {
    pub(in crate::commands::qemu_nbd) fn new(size: u64) -> Self {
        Self { size }
    }
}

impl Storage for Null {
    fn len(&self) -> io::Result<u64> {
        Ok(self.size)
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = self.size.saturating_sub(offset.bytes());
        let length = usize::try_from(rest).unwrap_or(usize::MAX).min(buffer.len());
        buffer[..length].fill(0);
        Ok(length)
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        let read = self.read_at(offset, buffer)?;
        Ok(if read == buffer.len() { TryRead::Complete } else { TryRead::WouldBlock })
    }

    fn write_at(&self, _: HostOffset, _: &[u8], _: Durability) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        if length == self.size { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
    }

    fn punch_hole(&self, _: HostOffset, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: HostOffset, _: u64, _: ZeroMode, _: Speed) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        capabilities.fast_zero = true;
        capabilities.discard = true;
        capabilities
    }

    fn next_extent(&self, _: HostOffset, length: u64) -> io::Result<StorageExtent> {
        Ok(StorageExtent { length, kind: ExtentKind::Hole })
    }
}
