//! The options of a conversion.

use std::num::NonZeroUsize;
use std::ops::Range;

use imgfmt::jobs::{Background, Clusters, Unreadable, Zeroes};
use imgfmt::{CacheMode, CreateOptions, OpenOptions};

use crate::image_location::ImageLocation;
use crate::remote::Remotes;
use crate::target::Durable;

/// Options of a conversion; created by [`new`](Self::new), changed field by field.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ConvertOptions {
    /// The properties of a new image. The size is that of the source; the format applies to an
    /// existing image as well. With a backing file, only what differs from it is written.
    pub create: CreateOptions,
    /// Whether the destination exists. By default it is created.
    pub destination: Destination,
    /// Sources that follow the first one, as parts of one disk. By default none.
    pub more: Vec<ImageLocation>,
    /// The part of each source that is copied, in bytes, as far as the source reaches. By default
    /// all.
    pub part: Range<u64>,
    /// Options for opening the sources.
    pub read: OpenOptions,
    /// Options for opening an existing image; the format and the access are set by the job.
    pub write: OpenOptions,
    /// Connects to the export that contains an existing image.
    pub remotes: Remotes,
    /// Connects to the export that is the source or, byte for byte, the destination. A connection
    /// may be restored there when it is lost.
    pub reconnecting: Remotes,
    /// The bitmaps that are copied. By default none.
    pub bitmaps: CopiedBitmaps,
    /// The form of written clusters.
    pub clusters: Clusters,
    /// The earlier contents of an existing disk.
    pub background: Background,
    /// The form of zeroes that are written into an existing disk.
    pub zeroes: Zeroes,
    /// What becomes of parts of the source that cannot be read.
    pub unreadable: Unreadable,
    /// Number of threads. By default the number of cores, and 8 with a server.
    pub threads: Option<NonZeroUsize>,
    /// The use of the page cache for the destination, if it is a file or a block device. By default
    /// a new image is unsafe until it is complete, and an existing disk is written back.
    pub cache: Option<CacheMode>,
    /// The durability of the result. By default it is durable later, like any file.
    pub durable: Durable,
}

impl ConvertOptions {
    /// Returns the options for a new image with these properties.
    #[must_use]
    pub fn new(create: CreateOptions) -> Self {
        Self {
            create,
            destination: Destination::default(),
            more: Vec::new(),
            part: 0..u64::MAX,
            read: OpenOptions::new(),
            write: OpenOptions::new(),
            remotes: Remotes::default(),
            reconnecting: Remotes::default(),
            bitmaps: CopiedBitmaps::default(),
            clusters: Clusters::default(),
            background: Background::default(),
            zeroes: Zeroes::default(),
            unreadable: Unreadable::default(),
            threads: None,
            cache: None,
            durable: Durable::Later,
        }
    }
}

/// The state of the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Destination {
    /// A file that does not exist, or a block device.
    #[default]
    New,
    /// A file, which may exist and is then replaced when the new one is complete; or a block
    /// device.
    Replaced,
    /// A disk that is overwritten; the rest of a larger one stays as it is.
    Existing,
}

/// The bitmaps of the source that are copied; those of its backing files never are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopiedBitmaps {
    /// None.
    #[default]
    None,
    /// All of them; an unreliable one is an error.
    All,
    /// The reliable ones; a warning names each of the others.
    Reliable,
}
