//! [`PlacedWrite`]: the place of a write that the server carries out itself.

use super::info::ExportError;
use super::placed_read::PlacedFile;

/// The place of a write. It belongs to this write until it is dropped: the server drops it when no
/// part of the write is in flight any more.
pub trait PlacedWrite: Send {
    /// Returns the file to write to, which is open for writing; `None` if there is none.
    fn file(&self) -> Option<PlacedFile<'_>>;

    /// Returns the offset in the file, in bytes. Offset and length are multiples of the file's
    /// alignment.
    fn offset(&self) -> u64;

    /// Called after all bytes were written: makes them a part of the disk. Must not block.
    ///
    /// # Errors
    ///
    /// The error for the client.
    fn written(self: Box<Self>) -> Result<(), ExportError>;
}
