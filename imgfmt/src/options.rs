//! Options for opening an image.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::error::Result;
use crate::format::Format;
use crate::open_policy::OpenPolicy;
use crate::storage::FileStorage;

/// Whether an image may be changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Access {
    /// Nothing in the file is ever changed.
    #[default]
    ReadOnly,
    /// Data may be written.
    ReadWrite,
}

/// Whether a file is locked against other programs while it is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Locking {
    /// Locks that QEMU's tools and this crate respect are held while the image is open, if its file
    /// system has any (some network file systems have none: see [`OpenOptions::on_unlocked`]).
    #[default]
    Auto,
    /// The same, and a file that cannot be locked is not opened.
    On,
    /// No locks. Two writers of one image destroy it: only for files nobody else can open.
    Off,
    /// The image is only read, and others may write to it at the same time, as a virtual machine does.
    /// What is read can then be a mix of old and new, in the image's own tables too: what seems to be
    /// damage need not be any.
    Shared,
}

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

/// What becomes of the backing file that an image names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BackingFile {
    /// It is opened, and shows where the image itself holds nothing.
    #[default]
    AsNamed,
    /// It is not opened: what the image itself does not hold reads as zero. The image goes on naming it, so
    /// that zeroes written now hide it later.
    Ignored,
}

/// What the dirty bitmaps of a writable image survive.
///
/// Whatever is chosen, a bitmap that did not survive is never shown as if it had: it stays marked
/// as in use, as QEMU has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Survives {
    /// Only the orderly closing of the image, as with QEMU.
    CleanClose,
    /// The death of the process too: bits are kept in a file beside the image that is mapped into
    /// memory. Writes make no additional system call.
    ProcessDeath,
    /// The loss of power too: a write to a part of the disk that was not written lately waits for a
    /// sync of that file.
    #[default]
    PowerLoss,
}

/// Whether what is written is put on stable storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Syncing {
    /// Flushes and writes with FUA are durable when they return.
    #[default]
    On,
    /// They return at once, and a power cut can destroy the image: for new images that nobody
    /// relies on yet, such as the result of a conversion. What is written is safe from a crash of
    /// the process only.
    Off,
}

/// How to open an image; made with [`OpenOptions::new`] and changed field by field.
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
    /// The format; `None` finds it by looking at the first bytes of the file. See
    /// [`Image::open`](crate::Image::open) for what that means for writable raw images.
    pub format: Option<Format>,
    /// Whether the image may be changed.
    pub access: Access,
    /// Whether it is locked while it is open.
    pub locking: Locking,
    /// Whether what is written is put on stable storage.
    pub syncing: Syncing,
    /// Which other files the image may name.
    pub policy: OpenPolicy,
    /// What becomes of the backing file that the image names.
    pub backing: BackingFile,
    /// The id or name of an internal snapshot to read in place of the present state.
    pub snapshot: Option<String>,
    /// How much memory, in bytes, the tables of a qcow2 image may take up while they are not
    /// waiting to be written. `None` covers the whole disk, up to 32 MiB.
    pub metadata_cache_bytes: Option<u64>,
    /// What the dirty bitmaps survive that note changes while the image is open.
    pub survives: Survives,
    pub(crate) on_unlocked: OnUnlocked,
    #[cfg(any(test, feature = "test-util"))]
    pub(crate) sidecar_folder: Option<Arc<crate::sidecar::RecordedFolder>>,
}

impl OpenOptions {
    /// Read-only, with locks, in whatever format the file has.
    pub fn new() -> Self {
        Self::default()
    }

    /// Opens the file in this format, whatever its first bytes look like.
    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.format = Some(format);
        self
    }

    /// Says whether the image may be changed.
    #[must_use]
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// Says whether the file is locked while it is open.
    #[must_use]
    pub fn locking(mut self, locking: Locking) -> Self {
        self.locking = locking;
        self
    }

    /// Has `hook` called for every file that is opened without locks, with [`Locking::Auto`], because
    /// its file system has none.
    #[must_use]
    pub fn on_unlocked(mut self, hook: Arc<UnlockedHook>) -> Self {
        self.on_unlocked = OnUnlocked(Some(hook));
        self
    }

    /// Opens a file as these options say.
    pub(crate) fn open_file(&self, path: &Path, access: Access) -> Result<FileStorage> {
        let storage = FileStorage::open(path, access, self.locking)?.with_syncing(self.syncing);
        if let (true, Some(hook)) = (storage.lacks_locks(), &self.on_unlocked.0) {
            hook(path);
        }
        Ok(storage)
    }

    /// Says whether what is written is put on stable storage.
    #[must_use]
    pub fn syncing(mut self, syncing: Syncing) -> Self {
        self.syncing = syncing;
        self
    }

    /// Says which other files the image may name.
    #[must_use]
    pub fn policy(mut self, policy: OpenPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Says what becomes of the backing file that the image names.
    #[must_use]
    pub fn backing(mut self, backing: BackingFile) -> Self {
        self.backing = backing;
        self
    }

    /// Reads an internal snapshot, given by id or name, in place of the present state.
    #[must_use]
    pub fn snapshot(mut self, name: impl Into<String>) -> Self {
        self.snapshot = Some(name.into());
        self
    }

    /// Says what dirty bitmaps survive.
    #[must_use]
    pub fn survives(mut self, survives: Survives) -> Self {
        self.survives = survives;
        self
    }

    /// Keeps the sidecar of dirty bitmaps in a folder of a recording rather than beside the image.
    #[cfg(any(test, feature = "test-util"))]
    #[must_use]
    pub fn sidecar_folder(mut self, folder: &Arc<crate::storage::fault::RecordedFolder>) -> Self {
        self.sidecar_folder = Some(Arc::clone(folder));
        self
    }

    /// Bounds the memory, in bytes, that tables of a qcow2 image take up.
    #[must_use]
    pub fn metadata_cache_bytes(mut self, bytes: u64) -> Self {
        self.metadata_cache_bytes = Some(bytes);
        self
    }
}
