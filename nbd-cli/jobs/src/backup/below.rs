//! The files below a backup, which may lie in other directories.

use std::ffi::OsStr;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use imgfmt::{Format, Image, ImageInfo, Locking, OpenOptions};

use crate::qemu_name::{
    BackingInName, NameInImage, NamedImage, from_name_in_image, has_scheme, path_in,
};

/// Most files examined: the largest number of layers in a chain.
const FILES_MAX: usize = 500;

/// Returns the backups below the one at `path`, newest first, as long as each file names the next
/// one and the identities match. The user has named `path`; these files need no naming by the user.
/// A file that is reachable by name alone, such as a foreign disk or a secret, has no matching
/// identity and ends the list.
pub(super) fn backups_below(path: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut above = (path.to_owned(), inspect(path));
    while found.len() < FILES_MAX
        && let (path, Some(info)) = &above
        && let Some(below) = below(path, info)
    {
        found.push(below.0.clone());
        above = below;
    }
    found
}

/// Returns the file that an image names, if it is the backup recorded as its base.
fn below(path: &Path, info: &ImageInfo) -> Option<(PathBuf, Option<ImageInfo>)> {
    let qcow2 = info.qcow2.as_ref()?;
    let wanted = qcow2.backup.as_ref()?.identity.base.id()?;
    let below = file_beside(path, qcow2.backing_name.as_ref()?)?;
    let info = inspect(&below)?;
    let id = info.qcow2.as_ref()?.backup.as_ref()?.identity.id;
    (id == wanted).then_some((below, Some(info)))
}

/// Resolves a file name in an image: relative names start at the image's directory.
fn file_beside(image: &Path, name: &OsStr) -> Option<PathBuf> {
    if let Some(name) = name.to_str().filter(|name| has_scheme(name)) {
        return match from_name_in_image(name).ok()? {
            NamedImage {
                name: NameInImage::File(path),
                backing: BackingInName::AsNamed,
                part,
                ..
            } => part.is_whole().then_some(path),
            _ => None,
        };
    }
    let path = path_in(name);
    // As in QEMU a name with the scheme `file:` starts at the working directory.
    let is_plain = path.as_os_str() == name;
    Some(match image.parent().filter(|_| is_plain) {
        Some(directory) => directory.join(path),
        None => path.to_owned(),
    })
}

/// Returns metadata of a plain file or a block device. Nothing else is opened: opening a pipe would
/// block.
fn inspect(path: &Path) -> Option<ImageInfo> {
    let kind = path.metadata().ok()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return None;
    }
    let options = OpenOptions::new().format(Format::Qcow2).locking(Locking::Off);
    Image::inspect_file(path, &options).ok()
}
