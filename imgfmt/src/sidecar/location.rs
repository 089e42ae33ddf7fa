//! The location of a sidecar and of its bytes.

use std::fmt;
use std::io;
use std::sync::atomic::AtomicU64;

use super::layout::{Description, LogShape};
use crate::access::Access;

/// Returns word `n` of the bits of bitmap `m`, bit 0 first, at the time when the file is created.
pub(crate) type InitialWords<'a> = &'a dyn Fn(usize, u64) -> u64;

/// The location of the sidecar of an image: in the directory of the image, or in a recorded one for
/// tests.
pub(crate) trait SidecarLocation: Send + Sync + fmt::Debug {
    /// Creates a new sidecar with these bits, which replaces the old one, if any. At the level of
    /// power loss it is durable on return.
    fn create(
        &self,
        description: &Description,
        words: InitialWords<'_>,
    ) -> io::Result<Box<dyn SidecarStorage>>;

    /// Opens the existing sidecar, if any. No other process can open it until it is closed.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if another process keeps it open; the error names that process.
    fn open(&self, access: Access) -> io::Result<Option<Box<dyn FoundBytes>>>;

    /// Removes the sidecar, if there is one; durable on return.
    fn remove(&self) -> io::Result<()>;

    /// Its name for messages.
    fn name(&self) -> String;

    /// Checks that a sidecar can be created, and leaves no file.
    fn probe(&self, description: &Description) -> io::Result<()>;

    /// The identity of the machine's boot; empty if it is unknown.
    fn boot_id(&self) -> String;

    /// The shape of the activity log for a disk of this size in bytes.
    fn log_shape(&self, disk_size: u64) -> LogShape {
        LogShape::for_disk(disk_size)
    }
}

/// The bytes of a sidecar: a mapped file, or recorded memory for tests.
pub(crate) trait SidecarStorage: Send + Sync + fmt::Debug {
    /// All bytes, as little-endian words.
    fn words(&self) -> &[AtomicU64];
    /// Writes to a place that is never used through [`words`](Self::words); durable on return.
    fn write_durable(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes everything durable that was stored in the words before.
    fn sync(&self) -> io::Result<()>;
    /// Removes the file, so that no recovery uses it; durable on return.
    fn remove(&self) -> io::Result<()>;
}

/// The bytes of a sidecar that was found.
pub(crate) trait FoundBytes: fmt::Debug {
    fn length(&self) -> io::Result<u64>;
    fn read_bytes(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

impl FoundBytes for Box<dyn FoundBytes> {
    fn length(&self) -> io::Result<u64> {
        (**self).length()
    }

    fn read_bytes(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        (**self).read_bytes(offset, buffer)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        (**self).write(offset, bytes)
    }
}
