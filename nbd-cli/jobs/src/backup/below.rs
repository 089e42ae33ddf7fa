//! The files below a backup, which may lie in other directories.

use std::ffi::OsStr;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use imgfmt::{Format, Image, ImageInfo, Locking, OpenOptions};

use crate::qemu_name::{NameInImage, from_name_in_image, has_scheme, path_in};

/// How many files are looked at: as many as a chain may have layers.
const FILES_MAX: usize = 500;

/// The backups on which the one at `path` was made, the newest first, as far as each file says that
/// it was made on the next one and that is the one. The user has named `path`; these are files that
/// need no naming: what an image leads to by its name alone, be it a foreign disk or a secret,
/// carries no such identity and ends the list.
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

/// The file that an image names, if it is the backup that it says it was made on.
fn below(path: &Path, info: &ImageInfo) -> Option<(PathBuf, Option<ImageInfo>)> {
    let qcow2 = info.qcow2.as_ref()?;
    let wanted = qcow2.backup.as_ref()?.identity.base.id()?;
    let below = file_beside(path, qcow2.backing_name.as_ref()?)?;
    let info = inspect(&below)?;
    let id = info.qcow2.as_ref()?.backup.as_ref()?.identity.id;
    (id == wanted).then_some((below, Some(info)))
}

/// The file that a name in an image stands for: relative names start at the image's directory.
fn file_beside(image: &Path, name: &OsStr) -> Option<PathBuf> {
    if let Some(name) = name.to_str().filter(|name| has_scheme(name)) {
        return match from_name_in_image(name).ok()? {
            NameInImage::File(path) => Some(path),
            NameInImage::Export(_) => None,
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

/// Facts about a plain file or a block device. Nothing else is opened: a pipe would be waited for.
fn inspect(path: &Path) -> Option<ImageInfo> {
    let kind = path.metadata().ok()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return None;
    }
    let options = OpenOptions::new().format(Format::Qcow2).locking(Locking::Off);
    Image::inspect_file(path, &options).ok()
}
