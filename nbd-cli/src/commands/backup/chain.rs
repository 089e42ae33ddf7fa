//! The backup that a new one builds on.

use std::path::{Component, Path, PathBuf};

use imgfmt::{Format, Image};

use super::BackupArgs;
use crate::commands::image::open::explained;
use crate::error::CommandError;

/// The backup before this one.
pub(super) struct Base {
    pub(super) path: PathBuf,
    pub(super) size: u64,
    pub(super) format: Format,
    /// Its name as it is to stand in the new file.
    pub(super) name: String,
}

impl Base {
    pub(super) fn open(path: &Path, args: &BackupArgs) -> Result<Self, CommandError> {
        let options = args.trust.options();
        let image = Image::open(path, &options).map_err(|error| match error.found_format() {
            Some(format) => CommandError::new(format!(
                "'{}' is a {} image and no backup that an incremental one could build on; make a \
                 full backup",
                path.display(),
                format.description()
            )),
            None => explained(error),
        })?;
        let name = relative(path, folder_of(&args.target))?;
        Ok(Self { path: path.to_owned(), size: image.size(), format: image.format(), name })
    }
}

/// The folder a file is in.
pub(super) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// The path of a file as seen from a folder. Relative, so that a chain can be moved as a whole.
fn relative(file: &Path, folder: &Path) -> Result<String, CommandError> {
    let real = |path: &Path| {
        path.canonicalize().map_err(|error| {
            CommandError::new(format!("cannot find '{}': {error}", path.display()))
        })
    };
    let (file, folder) = (real(file)?, real(folder)?);
    let mut down = file.components().peekable();
    let mut up = folder.components().peekable();
    while up.peek().is_some() && up.peek() == down.peek() {
        up.next();
        down.next();
    }
    let steps = up.map(|_| Component::ParentDir).chain(down);
    let path: PathBuf = steps.collect();
    let name = path.to_str().ok_or_else(|| {
        CommandError::new(format!(
            "'{}' cannot be named in a qcow2 file: its path is not valid UTF-8",
            file.display()
        ))
    })?;
    // What looks like a scheme would not be taken for a file.
    let has_scheme = name.split('/').next().is_some_and(|first| first.contains(':'));
    Ok(if has_scheme { format!("./{name}") } else { name.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_from_the_folder_to_the_file() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        for file in ["a/f", "f", "a/b/x:y"] {
            std::fs::write(root.join(file), "").unwrap();
        }
        for (file, folder, name) in [
            ("a/f", "a", "f"),
            ("a/f", ".", "a/f"),
            ("f", "a/b", "../../f"),
            ("a/b/../f", "a/b", "../f"),
            ("a/b/x:y", "a/b", "./x:y"),
        ] {
            let found = relative(&root.join(file), &root.join(folder)).unwrap();
            assert_eq!(found, name, "{file} from {folder}");
        }
    }
}
