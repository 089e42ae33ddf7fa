//! [`PlacedWrite`]: the place of a write that the server carries out itself.

use std::io;

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

    /// Whether the bytes are a durable part of the disk as soon as they are on stable storage in
    /// the file. A write that has to be durable then needs no [`flush`](super::Export::flush).
    fn is_durable_alone(&self) -> bool {
        false
    }

    /// Called after a write to stable storage has failed, unless there is no space for its bytes.
    /// It is not repeated. The system reports lost data once, and the error may be that of other
    /// data: the server reports it to all clients of the export. Must not block.
    fn failed(self: Box<Self>, _error: &io::Error) {}

    /// Called after all bytes were written: makes them a part of the disk. Must not block.
    ///
    /// # Errors
    ///
    /// The error for the client.
    fn written(self: Box<Self>) -> Result<(), ExportError>;
}
