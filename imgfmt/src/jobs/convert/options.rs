//! Options of a conversion.

use std::num::NonZeroUsize;
use std::sync::Arc;

use crate::units::GuestOffset;
use crate::zero::Content;

/// The contents of the destination where nothing is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Background {
    /// Zero: it is a new image, or known to be empty. Zeroes are not written.
    Zero,
    /// Unknown: everything is written.
    #[default]
    Unknown,
}

/// The form of written clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Clusters {
    /// Uncompressed.
    #[default]
    Plain,
    /// Compressed, if that saves space and the format supports it.
    Compressed,
}

/// Reads the disk of a source that reports holes in its answers, such as a server's export.
pub trait SourceReader: Send + Sync {
    /// Fills `buffer` with the bytes at `offset`, or returns that all of them are zero; the
    /// contents of `buffer` are then ignored.
    ///
    /// # Errors
    ///
    /// A whole sentence for the user.
    fn read(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<Content, String>;
}

/// Options of a conversion; created by [`Default`], changed field by field.
#[derive(Clone)]
#[non_exhaustive]
pub struct ConvertOptions {
    /// Number of threads: 256 at most; by default the number of cores.
    pub threads: NonZeroUsize,
    /// The earlier contents of the destination.
    pub background: Background,
    /// The form of written clusters.
    pub clusters: Clusters,
    /// Reads the source in place of the image itself, which still provides its extents.
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
