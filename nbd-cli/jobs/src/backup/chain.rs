//! The backup on which a new one builds.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use crate::target::stacked::share_data;
use crate::target::{self, Existing};
use imgfmt::storage::FileIdentity;
use imgfmt::{
    Backup, BackupBase, BackupIdentity, Format, Image, Locking, OpenOptions, OpenPolicy, Uuid,
};

use super::below::backups_below;
use super::options::{BackupJob, BackupSource, UnknownBase};
use crate::error::{JobError, JobErrorKind};
use crate::files::directory_of;
use crate::text::printable;

/// Most files of a directory examined in the search for other backups.
const FILES_MAX: usize = 65536;

/// The previous backup.
pub(super) struct Base {
    pub(super) path: PathBuf,
    /// The base and the backups below it: they may be opened wherever they are.
    pub(super) files: Vec<PathBuf>,
    /// Size of the image in bytes.
    size: u64,
    pub(super) format: Format,
    /// The base's name, as written into the new file.
    pub(super) name: OsString,
    identity: Option<BackupIdentity>,
    /// The reason why it may be the wrong one, as far as the files show.
    problem: Option<String>,
}

impl Base {
    /// Opens the base and checks that the new backup can build on it.
    pub(super) fn open(path: &Path, work: BackupJob<'_>) -> Result<Self, JobError> {
        let files = [vec![path.to_owned()], backups_below(path)].concat();
        let policy = files.iter().fold(work.options.policy.clone(), OpenPolicy::allow_file);
        let options = work.open_options().locking(work.read_locking()).policy(policy);
        let image = Image::open(path, &options).map_err(|error| match error.found_format() {
            Some(format) => JobError::new(
                JobErrorKind::Base,
                format!(
                    "'{}' is a {} image, not a backup that an incremental one can build on; make a \
                 full backup",
                    path.display(),
                    format.description()
                ),
            ),
            None => JobError::opening(JobErrorKind::Base, error).advise_sharing(),
        })?;
        check_encryption(&image, path, work)?;
        let name = match work.is_on_device() || is_device(path) {
            // Devices are not moved together, and their names may lead to other devices later.
            true => absolute(path)?,
            false => relative(path, directory_of(work.target))?,
        };
        let chain = image.backups_of_chain();
        let overwritten = |layer: &Option<PathBuf>| {
            layer.as_deref().is_some_and(|layer| is_same_device(layer, work.target))
        };
        if chain.iter().any(|(layer, _)| overwritten(layer)) {
            return Err(JobError::new(
                JobErrorKind::Base,
                format!(
                    "the backup cannot be made on '{}': that holds its base '{}', or what the base is made \
                 upon; give another target",
                    work.target.display(),
                    path.display()
                ),
            ));
        }
        let identity = chain.first().and_then(|(_, backup)| Some(backup.clone()?.identity));
        let mut base = Self {
            path: path.to_owned(),
            files,
            size: image.size(),
            format: image.format(),
            name,
            identity,
            problem: chain_problem(&chain),
        };
        // With a control socket the server knows better.
        if base.problem.is_none() && !work.has_control() {
            base.problem = base.problem_without_control(work);
        }
        Ok(base)
    }

    /// Refuses a base of a disk of another size, and a base that may be the wrong one unless the
    /// user vouches for it.
    pub(super) fn check(&self, size: u64, work: BackupJob<'_>) -> Result<(), JobError> {
        self.check_size(size)?;
        match &self.problem {
            Some(problem) if work.options.unknown_base == UnknownBase::Refuse => {
                Err(JobError::new(
                    JobErrorKind::Base,
                    format!(
                        "'{}' cannot be the base of this backup: {problem}; give the backup after which the \
                 bitmap started, or make a full backup (or add --trust-base, if you know that it is \
                 that one)",
                        self.path.display()
                    ),
                ))
            }
            _ => Ok(()),
        }
    }

    /// The information about the base that is written into the new file.
    pub(super) fn identity(&self) -> BackupBase {
        match (self.id(), &self.problem) {
            (Some(id), None) => BackupBase::Backup(id),
            (id, _) => BackupBase::Trusted(id),
        }
    }

    pub(super) fn id(&self) -> Option<Uuid> {
        self.identity.as_ref().map(|identity| identity.id)
    }

    /// The base's disk, if it is known.
    pub(super) fn disk(&self) -> Option<Uuid> {
        self.identity.as_ref()?.disk
    }

    fn check_size(&self, size: u64) -> Result<(), JobError> {
        let (own, fits) = match &self.identity {
            Some(identity) => (identity.disk_size, identity.disk_size == size),
            // Images are larger than disks whose size is not a multiple of 512.
            None => (self.size, self.size == size || self.size == size.next_multiple_of(512)),
        };
        if fits {
            return Ok(());
        }
        Err(JobError::new(
            JobErrorKind::Base,
            format!(
                "the disk has {size} bytes and its last backup '{}' {own}: the disk was resized, so \
             make a full backup",
                self.path.display(),
            ),
        ))
    }

    /// The error of a base of another disk.
    pub(super) fn of_another_disk(&self) -> JobError {
        JobError::new(
            JobErrorKind::Base,
            format!(
                "'{}' is a backup of another disk; give the last backup of this one as --base, or make a \
             full backup",
                self.path.display()
            ),
        )
    }

    /// The error of a base that is not the start of the bitmap: the bitmap started after `right`.
    pub(super) fn wrong(&self, bitmap: &str, right: Uuid, target: &Path) -> JobError {
        let found = find_backup(&[&self.path, target], |found| {
            found.identity.id == right && found.is_unchanged
        });
        let right = match found {
            Some(path) => format!("'{}'", path.display()),
            None => format!("the backup {right}"),
        };
        JobError::new(
            JobErrorKind::Base,
            format!(
                "'{}' cannot be the base of this backup: the bitmap '{}' started after {right}; give that as \
             --base, or make a full backup",
                self.path.display(),
                printable(bitmap)
            ),
        )
    }

    /// Returns the reason against this base, as far as it can be known without the server.
    fn problem_without_control(&self, work: BackupJob<'_>) -> Option<String> {
        let identity = self.identity.as_ref()?;
        let export = match work.source {
            BackupSource::Export(uri) => uri.export_name.as_str(),
            BackupSource::Checkpoint { export, .. } => export,
        };
        if identity.export != export {
            return Some(format!(
                "it is a backup of the export '{}', not of '{}'",
                printable(&identity.export),
                printable(export)
            ));
        }
        if let (Some(own), Some(bitmap)) = (&identity.bitmap, &work.options.bitmap)
            && own != bitmap
        {
            return Some(format!(
                "it was made for the bitmap '{}', not for '{}'",
                printable(own),
                printable(bitmap)
            ));
        }
        let is_child = |other: &Backup| other.identity.base.id() == Some(identity.id);
        let child = find_backup(&[&self.path, work.target], is_child)?;
        Some(format!("'{}' was made on it since", child.display()))
    }
}

/// Refuses to write in the clear what belongs to an encrypted disk.
fn check_encryption(base: &Image, path: &Path, work: BackupJob<'_>) -> Result<(), JobError> {
    let layers = base.encrypted_layers();
    let path = path.display();
    if work.options.encryption.is_none() && layers.contains(&true) {
        return Err(JobError::new(
            JobErrorKind::Base,
            format!(
                "'{path}' or a file below it is encrypted, and the new backup would not be: add --encrypt \
                 and --new-key-file, or make a full backup"
            ),
        ));
    }
    if work.options.encryption.is_some() && layers.contains(&false) {
        work.context.observer.warning(&format!(
            "'{path}' or a file below it is not encrypted, and remains so; only the new backup is"
        ));
    }
    Ok(())
}

/// Returns the reason why a chain of backups, newest first, cannot be built on.
pub(crate) fn chain_problem(chain: &[(Option<PathBuf>, Option<Backup>)]) -> Option<String> {
    let mut layers = chain.iter();
    let mut expected = None;
    let mut is_first = true;
    loop {
        let Some((path, backup)) = layers.next() else {
            return expected.map(|_| "the backup on which it was made is missing".to_owned());
        };
        let subject = match path {
            Some(path) if !is_first => format!("'{}' below it", path.display()),
            _ => "it".to_owned(),
        };
        if path.as_deref().is_some_and(is_device) {
            return Some(format!(
                "{subject} is on a block device, which other programs can change without a trace"
            ));
        }
        let Some(backup) = backup else {
            return Some(format!(
                "{subject} carries no identity of a backup (an older version made it, or it was \
                 converted, or is none)"
            ));
        };
        if expected.is_some_and(|expected| expected != backup.identity.id) {
            return Some(format!("{subject} is not the backup on which the one above was made"));
        }
        if !backup.is_unchanged {
            return Some(format!("{subject} was opened for writing or cut off after it was made"));
        }
        is_first = false;
        match backup.identity.base {
            BackupBase::None if layers.next().is_some() => {
                return Some(format!("{subject} is a full backup and has a backing file"));
            }
            // The user vouched for the layers below.
            BackupBase::None | BackupBase::Trusted(_) => return None,
            BackupBase::Backup(id) => expected = Some(id),
        }
    }
}

/// Returns another backup in the directories of these files, the first by name.
fn find_backup(files: &[&Path], is_wanted: impl Fn(&Backup) -> bool) -> Option<PathBuf> {
    let mut directories: Vec<&Path> = files.iter().map(|file| directory_of(file)).collect();
    directories.dedup();
    let entries = directories.iter().filter_map(|directory| directory.read_dir().ok());
    let entries = entries.flat_map(|entries| entries.take(FILES_MAX)).flatten();
    let files = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
    // Incomplete backups are ignored.
    let files = files
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_none_or(|extension| extension != "partial"));
    files.filter(|path| backup_in(path).is_some_and(|found| is_wanted(&found))).min()
}

fn backup_in(path: &Path) -> Option<Backup> {
    let mut magic = [0; 4];
    File::open(path).ok()?.read_exact(&mut magic).ok()?;
    if magic != *b"QFI\xfb" {
        return None;
    }
    let options = OpenOptions::new().format(Format::Qcow2).locking(Locking::Off);
    Image::inspect_file(path, &options).ok()?.qcow2?.backup
}

/// Returns the path of a file relative to a directory, so that a chain can be moved as a whole.
fn relative(file: &Path, directory: &Path) -> Result<OsString, JobError> {
    let real = |path: &Path| {
        path.canonicalize().map_err(|error| {
            JobError::new(JobErrorKind::Base, format!("cannot find '{}': {error}", path.display()))
        })
    };
    let (file, directory) = (real(file)?, real(directory)?);
    let mut down = file.components().peekable();
    let mut up = directory.components().peekable();
    while up.peek().is_some() && up.peek() == down.peek() {
        up.next();
        down.next();
    }
    let steps = up.map(|_| Component::ParentDir).chain(down);
    let path: PathBuf = steps.collect();
    // A name that looks like a URI scheme would not be read as a file name.
    let first = path.components().next().map(|first| first.as_os_str().as_bytes());
    let has_scheme = first.is_some_and(|first| first.contains(&b':'));
    Ok(if has_scheme { Path::new(".").join(path) } else { path }.into())
}

fn absolute(file: &Path) -> Result<OsString, JobError> {
    std::path::absolute(file).map(Into::into).map_err(|error| {
        JobError::new(JobErrorKind::Base, format!("cannot find '{}': {error}", file.display()))
    })
}

/// Returns whether a block device is the other one, or is stacked on it or below it.
fn is_same_device(one: &Path, other: &Path) -> bool {
    let pair = FileIdentity::of(one).zip(FileIdentity::of(other));
    is_device(other) && pair.is_some_and(|(one, other)| share_data(one, other))
}

fn is_device(path: &Path) -> bool {
    matches!(target::look(path), Ok(Existing::BlockDevice))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_from_the_directory_to_the_file() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        for file in ["a/f", "f", "a/b/x:y"] {
            std::fs::write(root.join(file), "").unwrap();
        }
        for (file, directory, name) in [
            ("a/f", "a", "f"),
            ("a/f", ".", "a/f"),
            ("f", "a/b", "../../f"),
            ("a/b/../f", "a/b", "../f"),
            ("a/b/x:y", "a/b", "./x:y"),
        ] {
            let found = relative(&root.join(file), &root.join(directory)).unwrap();
            assert_eq!(found, name, "{file} from {directory}");
        }
    }
}
