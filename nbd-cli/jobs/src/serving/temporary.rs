//! Temporary overlays: an image is read, and clients' writes go to a file that is removed
//! afterwards.

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

use imgfmt::storage::{FileIdentity, StorageExtent};
use imgfmt::{
    Access, BackingFile, BackingOptions, CacheMode, CreateOptions, Format, GuestOffset, GuestRange,
    Holes, HostOffset, Image, L2Entries, Locking, Lookup, Mapped, Mapping, OpenOptions, OpenPolicy,
    Storage, TryRead,
};

use super::error::OpenError;
use super::private_directory::PrivateDirectory;
use crate::error::{JobError, JobErrorKind};

/// The backing file's name in an overlay over storage without a file name.
const SCHEME: &str = "served";

/// Opens a temporary overlay of an image. Its file has no name any more on return. The policy of
/// the options applies to the files below it, too; `directory` is where the file is.
pub(super) fn temporary(
    source: &Path,
    options: &OpenOptions,
    directory: &Path,
) -> Result<Image, OpenError> {
    // Keeps the files unchanged until the overlay has opened them again.
    let base = Image::open(source, options)?;
    // Links are not resolved: names in the image start at the directory of the link.
    let path = std::path::absolute(source).map_err(|error| {
        JobError::new(
            JobErrorKind::Destination,
            format!("cannot put an overlay over '{}': {error}", source.display()),
        )
    })?;
    if options.snapshot.is_some() {
        return temporary_over(base, directory);
    }
    in_private_directory(directory, |overlay| over_file(overlay, &path, &base, options))
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
    below: &OpenOptions,
) -> imgfmt::Result<Image> {
    // In two steps, because the backing file may be somewhere where only the policy finds it.
    create(overlay, base.size())?;
    Image::change_backing_file(overlay, &options(), Some((path.as_os_str(), base.format())))?;
    let mut layer = BackingOptions::default();
    layer.backing = below.backing.clone();
    layer.cache = Some(below.cache);
    layer.locking = Some(below.locking);
    let mut options = options().backing(BackingFile::Given(Box::new(layer)));
    options.metadata_cache_bytes = below.metadata_cache_bytes;
    // The overlay is in another directory than what it names. All below it is opened as before.
    let policy = below.policy.clone().allow_file(path);
    // Only this process knows the overlay.
    let image = Image::open(overlay, &options.policy(policy).locking(Locking::Off))?;
    refuse_others(&image, overlay, base)?;
    Ok(image)
}

/// Refuses files below an overlay that are not those of the image it was made over.
fn refuse_others(image: &Image, overlay: &Path, base: &Image) -> imgfmt::Result<()> {
    let known: HashSet<FileIdentity> =
        base.files().into_iter().map(|(_, identity)| identity).collect();
    let mut files = image.files().into_iter().filter(|(path, _)| *path != overlay);
    match files.find(|(_, identity)| !known.contains(identity)) {
        Some((path, _)) => {
            let error = io::Error::other("another file took its place while it was opened");
            Err(imgfmt::Error::from_io("open", error).with_path(path))
        }
        None => Ok(()),
    }
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

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt as _;

    use super::super::options::{ServeOptions, Writes};
    use super::*;

    /// The first byte of a disk with a temporary overlay.
    fn first_byte(image: &Path, directory: &Path) -> u8 {
        let options = ServeOptions {
            writes: Writes::ToTemporaryFile,
            temporary_directory: Some(directory.to_owned()),
            ..ServeOptions::default()
        };
        let image = options.open_image(image).unwrap();
        let mut byte = [0xee];
        image.read_at(GuestOffset::new(0), &mut byte).unwrap();
        byte[0]
    }

    #[test]
    fn an_overlay_is_over_the_files_that_were_allowed() {
        let directory = tempfile::tempdir().unwrap();
        let (inner, outer) = (directory.path().join("inner"), directory.path().join("outer"));
        for (directory, content) in [(&inner, 1), (&outer, 2)] {
            std::fs::create_dir(directory).unwrap();
            std::fs::write(directory.join("flat"), [content; 512]).unwrap();
        }
        let text = b"# Disk DescriptorFile\nversion=1\nencoding=\"windows-1252\"\nRW 1 FLAT ";
        let with_name = |name: &[u8]| [&text[..], b"\"", name, b"\" 0\n"].concat();
        // Of the names that this one may have only the second leads to a file in the directory.
        let image = inner.join("disk.vmdk");
        std::os::unix::fs::symlink(&outer, inner.join("\u{e9}")).unwrap();
        let decoy = std::ffi::OsStr::from_bytes(b"\xe9");
        std::os::unix::fs::symlink(&inner, inner.join(decoy)).unwrap();
        std::fs::write(&image, with_name(b"\xe9/flat")).unwrap();
        assert_eq!(first_byte(&image, directory.path()), 1);
        // Names start at the directory of the link.
        let (image, link) = (outer.join("disk.vmdk"), inner.join("link.vmdk"));
        std::fs::write(&image, with_name(b"flat")).unwrap();
        std::os::unix::fs::symlink(&image, &link).unwrap();
        assert_eq!(first_byte(&image, directory.path()), 2);
        assert_eq!(first_byte(&link, directory.path()), 1);
    }
}
