//! Disks described by the options of QEMU's block drivers (feature `server`), as in `json:` names
//! and `--image-opts` of qemu-nbd: files, exports of other servers and `null-co`, parts of them,
//! and chains of backing files.
//!
//! ```
//! use nbd_jobs::blockdev::DiskDescription;
//! use nbd_jobs::serving::ServeOptions;
//!
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("disk.raw");
//! std::fs::write(&path, vec![7; 8192])?;
//! let name = format!(
//!     r#"json:{{"driver":"raw","offset":4096,"file":{{"driver":"file","filename":"{}"}}}}"#,
//!     path.display()
//! );
//! let disk = DiskDescription::from_name(&name)?;
//! let mut options = ServeOptions::default();
//! (options.format, options.window) = (disk.format, disk.window);
//! let opened = disk.open(&mut options)?;
//! let export = options.export(opened.image)?;
//! assert_eq!(export.info().size, 4096);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod description;
mod open;
mod options;
mod source;

pub use self::description::{DescribedBacking, DiskDescription, DiskSource};
pub use self::open::{OpenedDisk, SnapshotName};
pub(crate) use self::options::image_format;
pub use self::source::{open_source, source_uri};
pub use crate::qemu_name::{CacheSwitches, DriverSettings};
