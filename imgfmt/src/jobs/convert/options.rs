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
    /// Unknown, and read: only what differs is written, as into an overlay of another image.
    Compared,
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

/// The form of written zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Zeroes {
    /// Holes, or what takes the least space.
    #[default]
    Holes,
    /// Data: their space is allocated.
    Data,
}

/// What becomes of parts of the source that cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Unreadable {
    /// They end the conversion.
    #[default]
    Refused,
    /// Sectors that are damaged, or that the system cannot read from their disk, are zero in the
    /// destination, and the observer is [told](crate::jobs::Observer::unreadable). Other failures,
    /// such as a lost connection, still end the conversion.
    Zeroed,
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
    /// The form of written zeroes, where the background is not zero.
    pub zeroes: Zeroes,
    /// What becomes of parts of the source that cannot be read. A `reader` has to return them.
    pub unreadable: Unreadable,
    /// Reads the source in place of the image itself, which still provides its extents.
    pub reader: Option<Arc<dyn SourceReader>>,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            background: Background::default(),
            clusters: Clusters::default(),
            zeroes: Zeroes::default(),
            unreadable: Unreadable::default(),
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
            .field("zeroes", &self.zeroes)
            .field("unreadable", &self.unreadable)
            .finish_non_exhaustive()
    }
}
