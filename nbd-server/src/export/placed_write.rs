//! [`PlacedWrite`]: where the bytes of a write go that the server carries out by itself.

use super::info::ExportError;
use super::placed_read::PlacedFile;

/// The place of a write. It belongs to this write until it is dropped: the server drops it when nothing of
/// the write is under way any more.
pub trait PlacedWrite: Send {
    /// The file that is written to, which is open for writing; `None` if there is none.
    fn file(&self) -> Option<PlacedFile<'_>>;

    /// Where the bytes go in it; a multiple of the alignment of the file, as their number is.
    fn offset(&self) -> u64;

    /// Makes the bytes, all of which were written, a part of the disk. Never waits.
    ///
    /// # Errors
    ///
    /// What the client is to be told.
    fn written(self: Box<Self>) -> Result<(), ExportError>;
}
