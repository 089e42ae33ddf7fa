//! Announces decompression to the program: it takes a core for long.

use std::any::Any;
use std::cell::Cell;

/// Called before something is decompressed; the returned value is dropped afterwards.
pub type BeginDecompression = fn() -> Box<dyn Any>;

thread_local! {
    static BEGIN: Cell<Option<BeginDecompression>> = const { Cell::new(None) };
}

/// Has this thread call `begin` before it decompresses data of an image, from now on, for instance
/// to change its scheduling. The returned value is dropped on the same thread when the data is
/// decompressed.
pub fn before_decompression(begin: BeginDecompression) {
    BEGIN.set(Some(begin));
}

/// To be held while something is decompressed.
pub(crate) fn begin() -> Option<Box<dyn Any>> {
    BEGIN.get().map(|begin| begin())
}
