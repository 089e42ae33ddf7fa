//! Maps of disks: which layer of a chain has each part, what the part contains, and where it is.
//!
//! [`map_image`] walks an open image and its backing files, [`map_export`] asks the server of an
//! export. Both pass [`MapEntry`]s to a function of the caller, with the keys of qemu-img when they
//! are serialised:
//!
//! ```
//! use imgfmt::{CreateOptions, Format, Image, OpenOptions};
//! use nbd_jobs::image_map::map_image;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("disk.qcow2");
//! Image::create(&path, &CreateOptions::new(Format::Qcow2, 1 << 20))?;
//! let image = Image::open(&path, &OpenOptions::new())?;
//! let mut entries = Vec::new();
//! map_image(&image, |entry| {
//!     entries.push(entry);
//!     Ok::<_, imgfmt::Error>(())
//! })?;
//! assert_eq!((entries.len(), entries[0].length), (1, 1 << 20));
//! assert!(!entries[0].present, "no layer has anything");
//! # Ok(())
//! # }
//! ```

mod entry;
mod export;
mod image;

pub use self::entry::MapEntry;
pub use self::export::{map_client, map_export};
pub use self::image::map_image;
