//! Disk images: raw and qcow2, backing chains, snapshots and dirty bitmaps.
//!
//! All I/O is synchronous, positional and takes `&self`: threads and the workers of any async
//! runtime can share one [`Image`].
//!
//! ```
//! use imgfmt::{Access, Durability, Format, GuestOffset, Image, OpenOptions};
//!
//! # fn main() -> imgfmt::Result<()> {
//! # let directory = tempfile::tempdir().expect("a directory for the example");
//! # let path = directory.path().join("disk.img");
//! # std::fs::File::create(&path).and_then(|file| file.set_len(1 << 20)).expect("a disk");
//! let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite);
//! let disk = Image::open(&path, &options)?;
//! disk.write_at(GuestOffset::new(65536), b"hello", Durability::Cached)?;
//! disk.flush()?;
//!
//! let mut greeting = [0; 5];
//! disk.read_at(GuestOffset::new(65536), &mut greeting)?;
//! assert_eq!(&greeting, b"hello");
//!
//! for extent in disk.extents(disk.whole()) {
//!     let extent = extent?;
//!     println!("{}: {:?}", extent.range, extent.kind);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A qcow2 overlay stores what is written to it, and shows its backing file everywhere else:
//!
//! ```
//! use imgfmt::{CreateOptions, Durability, Format, GuestOffset, Image};
//!
//! # fn main() -> imgfmt::Result<()> {
//! # let directory = tempfile::tempdir().expect("a directory for the example");
//! # let (base, overlay) = (directory.path().join("base.img"), directory.path().join("overlay.qcow2"));
//! Image::create(&base, &CreateOptions::new(Format::Raw, 1 << 20))?;
//! let disk = Image::create(&overlay, &CreateOptions::overlay("base.img", Format::Raw))?;
//! disk.write_at(GuestOffset::new(65536), &[7; 65536], Durability::Fua)?;
//!
//! let extents: Vec<_> = disk.extents(disk.whole()).collect::<Result<_, _>>()?;
//! let depths: Vec<u32> = extents.iter().map(|extent| extent.depth).collect();
//! assert_eq!(depths, [2, 1, 2]);
//! disk.close()?;
//! # Ok(())
//! # }
//! ```
//!
//! A dirty bitmap records what is written. Opening the overlay for reading opens the files below
//! it too:
//!
//! ```
//! use imgfmt::{
//!     BITMAP_GRANULARITY_DEFAULT, CreateOptions, Durability, Format, GuestOffset, Image,
//!     OpenOptions, Recording,
//! };
//!
//! # fn main() -> imgfmt::Result<()> {
//! # let directory = tempfile::tempdir().expect("a directory for the example");
//! # let (base, overlay) = (directory.path().join("base.qcow2"), directory.path().join("overlay.qcow2"));
//! Image::create(&base, &CreateOptions::new(Format::Qcow2, 1 << 20))?.close()?;
//! let disk = Image::create(&overlay, &CreateOptions::overlay("base.qcow2", Format::Qcow2))?;
//! disk.add_bitmap("daily", BITMAP_GRANULARITY_DEFAULT, Recording::Enabled)?;
//! disk.write_at(GuestOffset::new(65536), &[7; 65536], Durability::Cached)?;
//! disk.close()?;
//!
//! let disk = Image::open(&overlay, &OpenOptions::new())?;
//! for bitmap in disk.bitmaps() {
//!     println!("{}: {:?}", bitmap.name, bitmap.state);
//! }
//! let extents = disk.dirty_extents("daily", disk.whole(), usize::MAX)?;
//! let dirty: Vec<_> = extents.iter().filter(|extent| extent.is_dirty).collect();
//! assert_eq!(dirty.len(), 1);
//! assert_eq!(dirty[0].range.offset(), GuestOffset::new(65536));
//!
//! let layers = Image::inspect_chain(&overlay, &OpenOptions::new())?;
//! assert_eq!(layers.len(), 2);
//! # Ok(())
//! # }
//! ```
//!
//! [`jobs`] contains work on complete disks: converting, comparing, committing, rebasing and
//! measuring images.
//!
//! The feature `encryption` reads and writes LUKS volumes and encrypted qcow2 images, through
//! OpenSSL; without it they are recognised and refused.
//!
//! The crate contains no network protocol. It follows a name inside an image only if the
//! [`OpenPolicy`] allows it.

mod access;
mod archive;
mod backing_file;
mod backing_slot;
mod backup;
mod bitmap;
mod bytes;
mod cache_mode;
mod chain;
mod create_options;
#[cfg(feature = "encryption")]
mod crypto;
mod decompression;
mod driver;
mod error;
mod extent;
mod foreign_info;
mod foreign_options;
mod format;
mod formats;
mod image;
mod info;
pub mod jobs;
mod known_depths;
mod layer;
mod lease;
mod luks;
mod mapping;
mod open_policy;
mod options;
mod ordered_lock;
mod passphrase;
mod per_thread;
mod probe;
mod qcow2;
mod raw;
mod read;
mod shown_text;
mod sidecar;
pub mod storage;
mod sys;
#[cfg(any(test, feature = "test-util"))]
pub mod testing;
mod unfinished;
mod units;
mod wanted;
mod write_map;
pub mod zero;

pub use access::{Access, BitmapDurability, ExpectedEncryption, Locking};
#[cfg(feature = "test-util")]
#[doc(hidden)]
pub use archive::disk_in as disk_in_archive;
pub use archive::{Archive, ArchiveMember};
pub use backing_file::{BackingFile, BackingOptions, NameTarget};
pub use backup::{
    Backup, BackupBase, BackupIdentity, BeganAfter, ContentMask, ContentSum, NotAUuid, Uuid,
};
pub use bitmap::{
    BITMAP_GRANULARITY_DEFAULT, BITMAP_NAME_BYTES_MAX, BitmapChange, BitmapInfo, BitmapState,
    DirtyBits, DirtyExtent, Recording,
};
pub use cache_mode::CacheMode;
pub use create_options::{
    Amendment, CompressionType, CreateOptions, DataFile, L2Entries, LazyRefcounts, Preallocation,
    Qcow2Version,
};
#[cfg(all(feature = "encryption", feature = "test-util"))]
#[doc(hidden)]
pub use crypto::luks::seal as seal_luks_header;
pub use decompression::{BeginDecompression, before_decompression};
pub use error::{Error, ErrorKind, LostBytes, LostWriteback, Result};
pub use extent::{Extent, ExtentKind};
pub use foreign_info::{
    FormatDetails, ImageKind, VdiInfo, VhdxInfo, VmdkExtent, VmdkInfo, VpcInfo,
};
pub use foreign_options::{ForeignOptions, Subformat, VhdSize, VmdkAdapter};
pub use format::Format;
pub use image::{Extents, Image, NewBase, NewOnDevice, Shrink};
pub use info::ImageInfo;
pub use luks::{Encryption, LuksDetails, LuksInfo, LuksSlot};
pub use mapping::{Content, Encoded, FileSpan, Holes, Lookup, Mapped, Mapping, ReadMap};
pub use open_policy::{NameReader, OpenPolicy, SchemeOpener};
pub use options::{FileNames, IncompleteDisk, OpenOptions, UnlockedHook};
pub use passphrase::{KeyChange, KeysChanged, NewKey, Passphrase};
pub use qcow2::{BitmapEntry, CheckReport, Qcow2Info, Repair, Snapshot, frozen_bitmap_name};
pub use shown_text::is_plain;
pub use sidecar::{BitmapDurabilityStatus, RecoveryPrecision};
pub use storage::{Capabilities, Durability, Speed, Storage, TryRead, TryWrite, ZeroMode};
pub use unfinished::Unfinished;
pub use units::{GuestOffset, GuestRange, HostOffset};
pub use write_map::WriteMap;
pub use zero::is_zero;
pub use zeroize::Zeroizing;
