//! What is put on a store, and how.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use imgfmt::Storage;

/// How an image is put on a store.
#[derive(Clone, Debug, Default)]
pub struct PushOptions {
    /// Whether an object of this name is replaced.
    pub replace: bool,
    /// Whether the object is read and compared afterwards.
    pub verify: bool,
    /// The directory in which it is recorded which parts have arrived. Without one, an interrupted
    /// push starts anew.
    pub records: Option<PathBuf>,
}

/// An image to be put on a store.
#[derive(Clone)]
pub struct PushSource {
    /// Its bytes.
    pub storage: Arc<dyn Storage>,
    /// Its name, the same when a push goes on: an absolute path.
    pub name: String,
    /// Says whether it is the same as when it was opened.
    pub is_unchanged: Arc<dyn Fn() -> bool + Send + Sync>,
}

impl fmt::Debug for PushSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PushSource").field(&self.name).finish()
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// The length of the object, in bytes.
    pub size: u64,
    /// Bytes of it that an earlier push had sent.
    pub resumed: u64,
}
