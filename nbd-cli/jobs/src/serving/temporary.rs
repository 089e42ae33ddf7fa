//! Temporary overlays: an image is read, and clients' writes go to a file that is removed
//! afterwards.

use std::io;
use std::path::Path;
use std::sync::Arc;

use imgfmt::storage::StorageExtent;
use imgfmt::{
    Access, BackingFile, BackingOptions, CacheMode, CreateOptions, Durability, Format, GuestOffset,
    GuestRange, Holes, HostOffset, Image, L2Entries, Lookup, Mapped, Mapping, OpenOptions,
    OpenPolicy, Storage, TryRead,
};

use super::error::OpenError;
use super::private_directory::PrivateDirectory;
use crate::error::{JobError, JobErrorKind};

/// The backing file's name in an overlay over storage without a file name.
const SCHEME: &str = "served";

/// Opens a temporary overlay of an image. Its file has no name any more on return. `policy` applies
/// to the overlay and the files below it; `directory` is where the file is.
pub(super) fn temporary(
    source: &Path,
    options: &OpenOptions,
    policy: OpenPolicy,
    directory: &Path,
) -> Result<Image, OpenError> {
    // Checks that all files below may be opened, and keeps them unchanged until the overlay, which
    // is in another directory and must be allowed to name any file, has opened them again.
    let base = Image::open(source, options)?;
    let path = source.canonicalize().map_err(|error| {
        JobError::new(
            JobErrorKind::Destination,
            format!("cannot put an overlay over '{}': {error}", source.display()),
        )
    })?;
    if options.snapshot.is_some() {
        return temporary_over(base, directory);
    }
    in_private_directory(directory, |overlay| over_file(overlay, &path, &base, policy, options))
}

/// Opens a temporary overlay of an open image, which appears as one layer.
pub(super) fn temporary_over(base: Image, directory: &Path) -> Result<Image, OpenError> {
    in_private_directory(directory, |overlay| over_image(overlay, base))
}

/// Creates an overlay in a file without a name.
fn in_private_directory(
    parent: &Path,
    make: impl FnOnce(&Path) -> imgfmt::Result<Image>,
) -> Result<Image, OpenError> {
    let directory = PrivateDirectory::inside(parent)?;
    let overlay = directory.overlay();
    let image = make(&overlay);
    let removed = match std::fs::remove_file(&overlay) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    };
    let image = image?;
    removed.map_err(|error| {
        JobError::new(
            JobErrorKind::Destination,
            format!("cannot remove '{}': {error}", overlay.display()),
        )
    })?;
    Ok(image)
}

/// As in QEMU the overlay is never synced: nothing in it outlives this process.
fn options() -> OpenOptions {
    OpenOptions::new().format(Format::Qcow2).access(Access::ReadWrite).cache(CacheMode::Unsafe)
}

/// No other program ever sees the overlay, so it has subclusters regardless of the age of the
/// image: small writes then copy nothing from below.
fn create(overlay: &Path, size: u64) -> imgfmt::Result<()> {
    let mut create = CreateOptions::new(Format::Qcow2, size);
    create.l2_entries = L2Entries::Extended;
    create.open.cache = CacheMode::Unsafe;
    Image::create(overlay, &create).map(drop)
}

/// Creates an overlay that names the file below it, so that all layers are visible.
fn over_file(
    overlay: &Path,
    path: &Path,
    base: &Image,
    policy: OpenPolicy,
    below: &OpenOptions,
) -> imgfmt::Result<Image> {
    // In two steps, because the backing file may be somewhere where only the policy finds it.
    create(overlay, base.size())?;
    Image::change_backing_file(overlay, &options(), Some((path.as_os_str(), base.format())))?;
    let mut layer = BackingOptions::default();
    layer.backing = below.backing.clone();
    layer.cache = Some(below.cache);
    let mut options = options().backing(BackingFile::Given(Box::new(layer)));
    options.metadata_cache_bytes = below.metadata_cache_bytes;
    Image::open(overlay, &options.policy(policy).locking(below.locking))
}

/// Creates an overlay over the contents of an open image: a snapshot has no name that an overlay
/// could contain.
fn over_image(overlay: &Path, base: Image) -> imgfmt::Result<Image> {
    create(overlay, base.size())?;
    let name = format!("{SCHEME}:image");
    Image::change_backing_file(overlay, &options(), Some((name.as_ref(), Format::Raw)))?;
    let base: Arc<dyn Storage> = Arc::new(ImageStorage(base));
    let opener = move |_: &str| Ok(Arc::clone(&base));
    Image::open(
        overlay,
        &options().policy(OpenPolicy::deny().allow_scheme(SCHEME, Arc::new(opener))),
    )
}

/// The contents of an image as read-only storage.
#[derive(Debug)]
struct ImageStorage(Image);

fn read_only() -> io::Error {
    io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "it is only read")
}

impl Storage for ImageStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.size())
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.0.size().saturating_sub(offset.bytes());
        let length = usize::try_from(available).unwrap_or(usize::MAX).min(buffer.len());
        let part = buffer.get_mut(..length).unwrap_or_default();
        self.0.read_at(GuestOffset::new(offset.bytes()), part).map_err(io::Error::other)?;
        Ok(length)
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        self.0.try_read_at(GuestOffset::new(offset.bytes()), buffer).map_err(io::Error::other)
    }

    fn write_at(&self, _: HostOffset, _: &[u8], _: Durability) -> io::Result<()> {
        Err(read_only())
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn punch_hole(&self, _: HostOffset, _: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_extent(&self, offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        let offset = offset.bytes();
        let length = length.min(self.0.size().saturating_sub(offset));
        let range = GuestRange::new(GuestOffset::new(offset), length);
        let range = range.ok_or(io::ErrorKind::InvalidInput)?;
        match self.0.extents(range).bounded(1, 1).next().transpose().map_err(io::Error::other)? {
            Some(extent) => Ok(StorageExtent { length: extent.range.length(), kind: extent.kind }),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn is_known_data(&self, offset: HostOffset, length: u64) -> bool {
        let Some(range) = GuestRange::new(GuestOffset::new(offset.bytes()), length) else {
            return false;
        };
        let is_data = |mapping: Mapping<'_>| !mapping.content.is_zero();
        let found = self.0.map(range, Holes::Told, Lookup::CachedOnly, is_data);
        found.is_ok_and(|mapped| mapped == Mapped::Complete)
    }
}
