//! What is refused as a backing file because the image above it could not be opened.

use std::ffi::OsStr;
use std::path::Path;

use super::below::{OpenTarget, Unopened, open_target};
use super::describe::inspect_layers;
use super::open::{Files, named};
use crate::access::{Access, Locking};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::options::OpenOptions;
use crate::storage::FileStorage;

/// Refuses a backing file with which the chain of the image at `path` would be too long or lead
/// back to itself. The image need not exist yet. Other errors of examining the chain are ignored.
pub(crate) fn check_new_backing(
    path: &Path,
    options: &OpenOptions,
    name: &OsStr,
    format: Format,
) -> Result<()> {
    let options = OpenOptions {
        format: Some(format),
        access: Access::ReadOnly,
        locking: Locking::Off,
        snapshot: None,
        // Only headers are read. Another policy may allow the chain later.
        policy: options.policy.clone().of_any_file(),
        ..options.clone()
    };
    let own = FileStorage::identity_of(path);
    let examined = inspect_below(path, name, &options, Files::below(own));
    let Err(error) = examined else { return Ok(()) };
    if error.is_chain_too_long() {
        return Err(error);
    }
    let is_missing = own.is_none() && error.kind() == ErrorKind::NotFound;
    let ends_here = is_missing && error.path().is_some_and(|missing| is_same_name(missing, path));
    if !error.is_leading_back() && !ends_here {
        return Ok(());
    }
    let detail = format!(
        "with '{}' below it, its chain of backing files would lead back to itself, and it could \
         not be opened",
        name.to_string_lossy().escape_debug()
    );
    Err(Error::new(ErrorKind::InvalidInput, "set the backing file of", detail))
}

/// Reads the headers of the layers that would be below the image at `path`.
fn inspect_below(path: &Path, name: &OsStr, options: &OpenOptions, files: Files) -> Result<()> {
    let target = options.policy.resolve(Some(path), name)?;
    let opened = open_target(target, options, Access::ReadOnly, &files.layers)?;
    let OpenTarget { storage, path, backing } = opened;
    let options = OpenOptions { backing, ..options.clone() };
    let shown = Some(path.clone().unwrap_or_else(|| name.into()));
    let layer = Unopened { storage, path, name: None, shown: shown.clone(), options };
    let inspected = inspect_layers(layer, files);
    inspected.map(drop).map_err(|error| named(error, shown.as_deref()))
}

/// Returns whether a file that is missing will be there when the image at `path` is.
fn is_same_name(missing: &Path, path: &Path) -> bool {
    let directory = |path: &Path| {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        parent.unwrap_or(Path::new(".")).canonicalize().ok()
    };
    missing.file_name() == path.file_name()
        && directory(path).is_some_and(|own| directory(missing) == Some(own))
}
