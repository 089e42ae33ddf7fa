//! Images and exports of other servers as exports of an `nbd-server` (feature `server`): locks,
//! temporary overlays, bitmaps, parts, filters.
//!
//! ```
//! use nbd_jobs::serving::{ServeOptions, Writes};
//!
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("disk.qcow2");
//! # imgfmt::Image::create(&path, &imgfmt::CreateOptions::new(imgfmt::Format::Qcow2, 1 << 20))?;
//! let mut options = ServeOptions::default();
//! options.writes = Writes::ToTemporaryFile;
//! let opened = options.open(&path)?;
//! assert_eq!(opened.export.info().size, 1 << 20);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod access;
mod durability;
mod error;
mod options;
mod patience;
mod private_directory;
mod reload;
mod source;
mod temporary;
mod upstream;

pub use self::access::{AccessSettings, Clients, ExportRule};
pub use self::error::OpenError;
pub use self::options::{OfferedBitmaps, OpenedExport, ServeOptions, Writes};
pub use self::private_directory::PrivateDirectory;
pub use self::reload::{Changes, Configuration, ConfiguredExport, LiveSettings, Settings};
pub(crate) use self::source::explained;
pub use self::source::{is_memory, same_source, source_uri, split_name};
