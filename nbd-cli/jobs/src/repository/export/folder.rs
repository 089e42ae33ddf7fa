//! The folder of an export, and the files of earlier ones in it.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use imgfmt::storage::FileStorage;
use imgfmt::{Access, Format, Image, Locking, OpenOptions};
use nbd_objects::repo::{Head, Id};
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::super::identity::identity_of;
use crate::backup::chain_problem;
use crate::date::date_and_time;
use crate::error::{JobError, JobErrorKind};
use crate::observer::JobContext;
use crate::target::partial_name;

/// Most bytes of the name of a disk in the name of a file.
const NAME_MAX: usize = 64;

/// The folder. No other export writes to it while this exists.
pub(super) struct Folder {
    path: PathBuf,
    _lock: File,
}

impl Folder {
    /// Opens the folder; makes it, for this user alone, if it does not exist.
    pub(super) fn open(path: &Path, context: &JobContext) -> Result<Self, JobError> {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            JobError::destination(format!("cannot {what} the folder '{}': {error}", path.display()))
        };
        let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(|error| failed("make", &error))?;
        let lock = File::open(path).map_err(|error| failed("open", &error))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(failed("write to", &"another export writes to it; wait for its end"));
            }
            // Some network file systems lock no folders.
            Err(_) => context.observer.unlocked(path),
        }
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Removes what an interrupted export left of a file.
    pub(super) fn clear(&self, path: &Path) -> Result<(), JobError> {
        let Some(partial) = partial_name(path) else { return Ok(()) };
        let Ok(metadata) = partial.symlink_metadata() else { return Ok(()) };
        let failed = |why: String| {
            let partial = partial.display();
            JobError::destination(format!("cannot remove '{partial}', which is left over: {why}"))
        };
        if !metadata.is_file() {
            return Err(failed("it is not a file".to_owned()));
        }
        // A program that uses it has it locked.
        let lock = FileStorage::open(&partial, Access::ReadWrite, Locking::Auto);
        let _lock = lock.map_err(|error| failed(error.to_string()))?;
        fs::remove_file(&partial).map_err(|error| failed(error.to_string()))
    }
}

/// The name of the file of a backup: those of one disk sort by time.
pub(super) fn file_name(id: Id, head: &Head) -> String {
    let is_plain = |it: char| it.is_ascii_alphanumeric() || matches!(it, '-' | '_' | '.');
    let plain = head.name.chars().map(|it| if is_plain(it) { it } else { '_' });
    // It neither hides the file nor looks like an option.
    let name: String = plain.take(NAME_MAX).collect();
    let name = match name.trim_start_matches(['-', '.']) {
        "" => "backup",
        name => name,
    };
    // `2026-11-20 18:30:00 UTC`; a colon ends the scheme of a URL.
    let time: String = date_and_time(head.time / 1000)
        .trim_end_matches(" UTC")
        .chars()
        .filter(|it| *it != ':')
        .map(|it| if it == ' ' { 'T' } else { it })
        .collect();
    // What is plain of the names of two disks may be the same.
    let disk = head.disks.first().map_or_else(String::new, |disk| {
        let hash = openssl::sha::sha256(disk.name.as_bytes());
        hash.iter().take(4).fold("-".to_owned(), |text, byte| text + &format!("{byte:02x}"))
    });
    format!("{name}-{time}-{id}{disk}.qcow2")
}

/// How files of an export are opened: the files below are in the same folder.
pub(super) fn options() -> OpenOptions {
    OpenOptions::new().format(Format::Qcow2)
}

/// Checks that a file is what an earlier export made of a backup.
pub(super) fn check_existing(path: &Path, id: Id, head: &Head) -> Result<(), JobError> {
    let info = Image::inspect_file(path, &options());
    let info = info.map_err(|error| JobError::opening(JobErrorKind::Destination, error))?;
    let expected = identity_of(id, head)?;
    let is_it = info.qcow2.and_then(|qcow2| qcow2.backup).is_some_and(|backup| {
        let identity = &backup.identity;
        backup.is_unchanged && identity.id == expected && identity.disk_size == head.size
    });
    match is_it {
        true => Ok(()),
        false => Err(JobError::destination(format!(
            "'{}' exists, and is not what an export of the backup {id} made, or was changed since; \
             move it away",
            path.display()
        ))),
    }
}

/// Checks that the files below a file are those it was made upon; returns the number of all.
pub(super) fn check_chain(path: &Path) -> Result<usize, JobError> {
    let image = Image::open(path, &options());
    let image = image.map_err(|error| JobError::opening(JobErrorKind::Destination, error))?;
    let chain = image.backups_of_chain();
    match chain_problem(&chain) {
        None => Ok(chain.len()),
        Some(problem) => Err(JobError::destination(format!(
            "'{}', which an earlier export made, cannot be built on: {problem}; use another folder",
            path.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use nbd_objects::repo::DiskHead;

    use super::*;

    fn head(name: &str) -> Head {
        let head = serde_json::json!({
            "name": name, "size": 1, "time": 1_763_663_400_000_u64, "data": 0, "added": 0,
            "body-length": 0, "body-hash": "",
        });
        serde_json::from_value(head).unwrap()
    }

    #[test]
    fn names_of_files_lead_nowhere_else() {
        let id: Id = "0123456789abcdef0123456789abcdef".parse().unwrap();
        for (name, start) in [
            ("vm1", "vm1-2025-11-20T183000-"),
            ("../../etc/passwd", "_.._etc_passwd-"),
            ("-rf .", "rf_.-"),
            ("nbd://host", "nbd___host-"),
            ("\u{fc}\u{202e}", "__-"),
            ("..", "backup-2025"),
        ] {
            let found = file_name(id, &head(name));
            assert!(
                found.starts_with(start) && found.ends_with(&format!("-{id}.qcow2")),
                "{found}"
            );
        }
        assert!(file_name(id, &head(&"n".repeat(1000))).len() < 200);
        let mut several = head("vm");
        several.disks = ["a b", "a_b"]
            .map(|name| DiskHead { name: name.to_owned(), ..DiskHead::default() })
            .into();
        let name = |disk| file_name(id, &several.of_disk(Some(disk)).unwrap());
        assert!(name("a b").starts_with("vm_a_b-2025-"), "{}", name("a b"));
        assert_ne!(name("a b"), name("a_b"));
    }
}
