//! A storage that discards all writes, for benchmarks: QEMU's drivers `null-co` and `null-aio`.

use std::io;
use std::time::Duration;

use super::{Capabilities, Durability, Speed, Storage, StorageExtent, TryRead, ZeroMode};
use crate::extent::ExtentKind;
use crate::units::HostOffset;

/// Reads as zero, and discards every write.
#[derive(Debug)]
pub struct NullStorage {
    size: u64,
    latency: Duration,
}

impl NullStorage {
    /// Creates a storage of `size` bytes; each read, write and flush blocks for `latency`.
    #[must_use]
    pub fn new(size: u64, latency: Duration) -> Self {
        Self { size, latency }
    }

    fn take_time(&self) {
        if !self.latency.is_zero() {
            std::thread::sleep(self.latency);
        }
    }

    fn fill(&self, offset: HostOffset, buffer: &mut [u8]) -> usize {
        let rest = self.size.saturating_sub(offset.bytes());
        let length = usize::try_from(rest).unwrap_or(usize::MAX).min(buffer.len());
        buffer[..length].fill(0);
        length
    }
}

impl Storage for NullStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.size)
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        self.take_time();
        Ok(self.fill(offset, buffer))
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        let is_prompt = self.latency.is_zero() && self.fill(offset, buffer) == buffer.len();
        Ok(if is_prompt { TryRead::Complete } else { TryRead::WouldBlock })
    }

    fn write_at(&self, _: HostOffset, _: &[u8], _: Durability) -> io::Result<()> {
        self.take_time();
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        if length == self.size { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
    }

    fn punch_hole(&self, _: HostOffset, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: HostOffset, _: u64, _: ZeroMode, _: Speed) -> io::Result<()> {
        self.take_time();
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.take_time();
        Ok(())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { fast_zero: true, discard: true, ..Capabilities::default() }
    }

    fn next_extent(&self, _: HostOffset, length: u64) -> io::Result<StorageExtent> {
        Ok(StorageExtent { length, kind: ExtentKind::Hole })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_disk_with_latency_takes_that_long_and_is_never_read_where_the_connection_stands() {
        let latency = Duration::from_millis(20);
        let disk = NullStorage::new(1 << 20, latency);
        let mut buffer = [1; 512];
        let start = HostOffset::new(0);
        assert!(matches!(disk.try_read_at(start, &mut buffer), Ok(TryRead::WouldBlock)));
        for call in [
            &mut || disk.read_at(start, &mut buffer).map(drop) as io::Result<()>,
            &mut || disk.write_at(start, &[0], Durability::Cached),
            &mut || disk.sync(),
        ] as [&mut dyn FnMut() -> io::Result<()>; 3]
        {
            let started = Instant::now();
            call().unwrap();
            assert!(started.elapsed() >= latency);
        }
        let mut buffer = [1; 512];
        let prompt = NullStorage::new(512, Duration::ZERO).try_read_at(start, &mut buffer);
        assert!(matches!(prompt, Ok(TryRead::Complete)));
        assert_eq!(buffer, [0; 512]);
    }
}
