//! Whether a file is changed, whether it is locked, and which failures its bitmaps survive.

/// Whether an image may be changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Access {
    /// The file is never changed.
    #[default]
    ReadOnly,
    /// Data may be written.
    ReadWrite,
}

/// Whether a file is locked against other programs while it is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Locking {
    /// Locks that QEMU's tools and this crate respect are held while the image is open, if its file
    /// system supports them (some network file systems do not: see
    /// [`OpenOptions::on_unlocked`](crate::OpenOptions::on_unlocked)).
    #[default]
    Auto,
    /// The same, and a file that cannot be locked is not opened.
    On,
    /// No locks. Two writers of one image destroy it: only for files that no other program can
    /// open.
    Off,
    /// The image is only read, and others may write to it at the same time, like a virtual machine.
    /// Reads can then return a mix of old and new, also of the image's own tables: apparent damage
    /// need not be real.
    Shared,
}

/// The failures that the dirty bitmaps of a writable image survive.
///
/// In all cases a bitmap that did not survive is never presented as if it had: it stays marked as
/// in use, as in QEMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BitmapDurability {
    /// None: only a clean close of the image stores them, as with QEMU.
    CleanClose,
    /// A crash of the process: bits are kept in a file beside the image that is mapped into memory.
    /// Writes make no additional system call.
    ProcessDeath,
    /// Power failure, too: a write to a part of the disk that was not written recently waits for a
    /// sync of that file.
    #[default]
    PowerLoss,
}

/// Whether a qcow2 image may be opened that is not encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ExpectedEncryption {
    /// It may: its header says whether it is.
    #[default]
    AsFound,
    /// It may not: the caller says that it is encrypted with LUKS.
    Luks,
}
