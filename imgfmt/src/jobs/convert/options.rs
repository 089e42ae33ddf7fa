//! What a conversion is told.

use std::num::NonZeroUsize;
use std::sync::Arc;

use crate::units::GuestOffset;
use crate::zero::Content;

/// What the destination reads as where nothing is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Background {
    /// Zero: it is a new image, or known to hold nothing. Zeroes are not written.
    Zero,
    /// Anything: everything is written.
    #[default]
    Unknown,
}

/// How clusters are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Clusters {
    /// As they are.
    #[default]
    Plain,
    /// Compressed, where that saves space and the format can.
    Compressed,
}

/// Reads the disk of a source that learns of holes when it is read, such as a server's export.
pub trait SourceReader: Send + Sync {
    /// Fills `buffer` from `offset` on, or says that all of it is zero; then what is in `buffer` does
    /// not matter.
    ///
    /// # Errors
    ///
    /// A whole sentence for the user.
    fn read(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<Content, String>;
}

/// How a disk is copied; made by [`Default`], changed field by field.
#[derive(Clone)]
#[non_exhaustive]
pub struct ConvertOptions {
    /// How many threads copy: 256 at most; by default as many as there are cores.
    pub threads: NonZeroUsize,
    /// What the destination reads as before.
    pub background: Background,
    /// How clusters are written.
    pub clusters: Clusters,
    /// Reads the source in place of the image itself, which still tells its extents.
    pub reader: Option<Arc<dyn SourceReader>>,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            background: Background::default(),
            clusters: Clusters::default(),
            reader: None,
        }
    }
}

impl std::fmt::Debug for ConvertOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConvertOptions")
            .field("threads", &self.threads)
            .field("background", &self.background)
            .field("clusters", &self.clusters)
            .finish_non_exhaustive()
    }
}
