//! Options for opening an image.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::access::{Access, BitmapDurability, ExpectedEncryption, Locking};
use crate::backing_file::BackingFile;
use crate::cache_mode::CacheMode;
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::open_policy::OpenPolicy;
use crate::passphrase::Passphrase;
use crate::storage::{Backlog, FileStorage, Part, Storage};

/// Called with the path of a file that is opened without locks because it cannot be locked.
pub type UnlockedHook = dyn Fn(&Path) + Send + Sync;

/// A hook that can be shared and shown.
#[derive(Clone, Default)]
pub(crate) struct OnUnlocked(Option<Arc<UnlockedHook>>);

impl fmt::Debug for OnUnlocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Some(..)" } else { "None" })
    }
}

/// Whether an image may be opened that [`Image::begin_overwrite`](crate::Image::begin_overwrite)
/// has marked and that was not completed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum IncompleteDisk {
    /// It is refused: its disk is a mixture of old and new.
    #[default]
    Refused,
    /// It is opened, to be overwritten again.
    Accepted,
}

/// What the name of a file says of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FileNames {
    /// `machine.ova`, the archive of a virtual machine, is its first disk, `machine.ova:2` and
    /// `machine.ova:disk.vmdk` are the others; `disk.vhd` and `disk.vpc` are fixed VHDs if they
    /// have a footer at their end.
    #[default]
    Telling,
    /// Nothing, as for QEMU: `machine.ova` is the file itself, and a fixed VHD is a raw disk unless
    /// the format is given. Names of disks in archives, which QEMU does not have, keep their
    /// meaning.
    AsInQemu,
}

/// Options for opening an image; created with [`OpenOptions::new`] and changed field by field.
///
/// ```
/// use imgfmt::{Access, Format, OpenOptions};
///
/// let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite);
/// assert_eq!(options.format, Some(Format::Raw));
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct OpenOptions {
    /// The format; `None` detects it from the first bytes of the file. See
    /// [`Image::open`](crate::Image::open) for the consequence for writable raw images.
    pub format: Option<Format>,
    /// Whether the image may be changed.
    pub access: Access,
    /// Whether it is locked while it is open.
    pub locking: Locking,
    /// What the name of the file says of it.
    pub names: FileNames,
    /// The use of the page cache, and when changes are durable: for the image and the files it
    /// names.
    pub cache: CacheMode,
    /// Whether the image is filled once, as by a copy: see
    /// [`FileStorage::written_once`](crate::storage::FileStorage::written_once).
    pub written_once: bool,
    /// The other files that the image may name.
    pub policy: OpenPolicy,
    /// The treatment of the backing file that the image names.
    pub backing: BackingFile,
    /// The id or name of an internal snapshot to read in place of the active state.
    pub snapshot: Option<String>,
    /// Memory limit, in bytes, for the L2 tables of each qcow2 image of the chain; changed tables
    /// may exceed it until they are written. The minimum is 256 KiB. `None` is enough for the
    /// complete disk, up to 32 MiB.
    pub metadata_cache_bytes: Option<u64>,
    /// The failures that recording dirty bitmaps survive while the image is open.
    pub bitmap_durability: BitmapDurability,
    /// The treatment of an image whose disk is incomplete; incomplete backing files are always
    /// refused.
    pub incomplete: IncompleteDisk,
    /// Whether the image, if it is a qcow2 image, must be encrypted. What is below it may be not.
    pub encryption: ExpectedEncryption,
    /// The part of the file or storage in which the image is. What the image names is opened as a
    /// whole.
    pub part: Part,
    /// The passphrases of encrypted images of the chain. Each is tried until one opens the image.
    pub passphrases: Vec<Passphrase>,
    /// The name of the image where it is not that of its file.
    pub(crate) known_as: Option<PathBuf>,
    pub(crate) on_unlocked: OnUnlocked,
    /// Everything in the image and its data file is on stable storage already.
    pub(crate) is_synced: bool,
    #[cfg(any(test, feature = "test-util"))]
    pub(crate) sidecar_directory: Option<Arc<crate::testing::RecordedDirectory>>,
}

impl OpenOptions {
    /// Creates options for reading, with locks and format detection.
    pub fn new() -> Self {
        Self::default()
    }

    /// Opens the file in this format, regardless of its first bytes.
    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.format = Some(format);
        self
    }

    /// Sets the name of an image that is not a file, such as an object of a store: its ending can
    /// tell its format, as that of a file can.
    #[must_use]
    pub fn known_as(mut self, name: impl Into<PathBuf>) -> Self {
        self.known_as = Some(name.into());
        self
    }

    /// Sets whether the image may be changed.
    #[must_use]
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// Sets whether the file is locked while it is open.
    #[must_use]
    pub fn locking(mut self, locking: Locking) -> Self {
        self.locking = locking;
        self
    }

    /// Sets a hook that is called for every file that is opened without locks, with
    /// [`Locking::Auto`], because its file system does not support them.
    #[must_use]
    pub fn on_unlocked(mut self, hook: Arc<UnlockedHook>) -> Self {
        self.on_unlocked = OnUnlocked(Some(hook));
        self
    }

    /// Returns the part of a storage in which the image is.
    pub(crate) fn part_of(&self, storage: Arc<dyn Storage>) -> Result<Arc<dyn Storage>> {
        self.part.of(storage).map_err(|error| Error::from_io("open", error))
    }

    /// Refuses a part, for changes that are made of whole files.
    pub(crate) fn refuse_part(&self, operation: &'static str) -> Result<()> {
        match self.part.is_whole() {
            true => Ok(()),
            false => {
                let detail = "it is in a part of a file, and this is done for whole files only";
                Err(Error::new(ErrorKind::Unsupported, operation, detail))
            }
        }
    }

    /// Opens a file as these options say.
    pub(crate) fn open_file(&self, path: &Path, access: Access) -> Result<FileStorage> {
        let mut storage = FileStorage::open_cached(path, access, self.locking, self.cache)?;
        if self.written_once && access == Access::ReadWrite {
            storage = storage.written_once(Backlog::OfSystem);
        }
        if let (true, Some(hook)) = (storage.lacks_locks(), &self.on_unlocked.0) {
            hook(path);
        }
        Ok(storage)
    }

    /// Sets the use of the page cache, and when changes are durable.
    #[must_use]
    pub fn cache(mut self, cache: CacheMode) -> Self {
        self.cache = cache;
        self
    }

    /// Declares that the image, if it is opened for writing, is filled once: what was written
    /// leaves the page cache early.
    #[must_use]
    pub fn written_once(mut self) -> Self {
        self.written_once = true;
        self
    }

    /// Sets the treatment of an image whose disk is incomplete.
    #[must_use]
    pub fn incomplete(mut self, incomplete: IncompleteDisk) -> Self {
        self.incomplete = incomplete;
        self
    }

    /// Sets the other files that the image may name.
    #[must_use]
    pub fn policy(mut self, policy: OpenPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Sets the treatment of the backing file that the image names.
    #[must_use]
    pub fn backing(mut self, backing: BackingFile) -> Self {
        self.backing = backing;
        self
    }

    /// Reads an internal snapshot, selected by id or name, in place of the active state.
    #[must_use]
    pub fn snapshot(mut self, name: impl Into<String>) -> Self {
        self.snapshot = Some(name.into());
        self
    }

    /// Sets the failures that dirty bitmaps survive.
    #[must_use]
    pub fn bitmap_durability(mut self, durability: BitmapDurability) -> Self {
        self.bitmap_durability = durability;
        self
    }

    /// Adds a passphrase for encrypted images of the chain. Opening such an image takes a second or
    /// more, by design.
    #[must_use]
    pub fn passphrase(mut self, passphrase: Passphrase) -> Self {
        self.passphrases.push(passphrase);
        self
    }

    /// Keeps the sidecar of dirty bitmaps in a directory of a recording rather than beside the
    /// image.
    #[cfg(any(test, feature = "test-util"))]
    #[must_use]
    pub fn sidecar_directory(mut self, directory: &Arc<crate::testing::RecordedDirectory>) -> Self {
        self.sidecar_directory = Some(Arc::clone(directory));
        self
    }

    /// Limits the memory, in bytes, for the L2 tables of each qcow2 image of the chain.
    #[must_use]
    pub fn metadata_cache_bytes(mut self, bytes: u64) -> Self {
        self.metadata_cache_bytes = Some(bytes);
        self
    }
}
