//! Files in `/run/nbd-cli` that tell which process keeps which device.
//!
//! Everybody may read the note about a device. The lock beside it is a file of its own, which only
//! its owner can open: a user who can open a file can lock it, and so make others wait.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::error::{JobError, JobErrorKind};
use crate::files::is_still;

const DIRECTORY: &str = "/run/nbd-cli";

/// A process that was killed keeps its devices until its requests to the kernel have ended.
const ENDING: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(20);

/// Processes that only look at a record hold its lock for an instant.
const LOOKING: Duration = Duration::from_millis(500);

/// What a process notes about a device that it keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    pub(super) pid: u32,
    pub(super) connections: usize,
}

/// The record of a device, locked while a process keeps the device.
#[derive(Debug)]
pub(super) struct Record {
    /// The note.
    path: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

/// A record as another process finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) note: Note,
    /// Whether the process still keeps the device.
    pub(super) is_kept: bool,
}

impl Record {
    /// Takes the record of a device, which no other process may have.
    ///
    /// # Errors
    ///
    /// If another process keeps the device, or the record cannot be made.
    pub(super) fn take(device: u32) -> Result<Self, JobError> {
        Self::take_in(Path::new(DIRECTORY), device)
    }

    fn take_in(directory: &Path, device: u32) -> Result<Self, JobError> {
        let (path, lock_path) = (path_in(directory, device), lock_path_in(directory, device));
        let failed = |error: io::Error| {
            let file = lock_path.display();
            JobError::new(
                JobErrorKind::Device,
                format!("cannot note in '{file}' which process keeps /dev/nbd{device}: {error}"),
            )
        };
        DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(failed)?;
        let start = Instant::now();
        loop {
            let mut options = OpenOptions::new();
            let options = options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let lock = options.open(&lock_path).map_err(failed)?;
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if is_still(&lock_path, &lock) => {
                    return Ok(Self { path, lock_path, _lock: lock });
                }
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) if start.elapsed() > LOOKING => break,
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    std::thread::sleep(PAUSE);
                }
                Err(error) => return Err(failed(error.into())),
            }
        }
        let keeper = look_in(directory, device).map_or_else(
            || "another process".to_owned(),
            |found| format!("process {}", found.note.pid),
        );
        Err(JobError::new(
            JobErrorKind::Device,
            format!(
                "/dev/nbd{device} is kept by {keeper}; detach it first, or leave it to that process"
            ),
        ))
    }

    /// Writes the note.
    pub(super) fn write(&mut self, note: &Note) -> io::Result<()> {
        let text = serde_json::to_string(note)?;
        // A reader finds one note or the other.
        let new = self.path.with_extension("new");
        let _ = std::fs::remove_file(&new);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&new)?;
        writeln!(file, "{text}")?;
        file.set_permissions(Permissions::from_mode(0o644))?;
        std::fs::rename(&new, &self.path)
    }

    /// Removes the record of a device that is no longer attached.
    pub(super) fn remove(self) {
        // Without a note, the device is not taken for that of a process that was killed.
        let _ = std::fs::remove_file(&self.path);
        let _ = std::fs::remove_file(&self.lock_path);
    }
}

/// Returns whether the process that kept a device has ended without detaching it. Waits for one
/// that may be ending.
pub(super) fn has_lost_its_keeper(device: u32) -> bool {
    has_lost_its_keeper_in(Path::new(DIRECTORY), device, ENDING)
}

fn has_lost_its_keeper_in(directory: &Path, device: u32, patience: Duration) -> bool {
    let start = Instant::now();
    loop {
        match look_in(directory, device) {
            Some(found) if found.is_kept && start.elapsed() < patience => std::thread::sleep(PAUSE),
            Some(found) => return !found.is_kept,
            None => return false,
        }
    }
}

/// Returns the record of a device, if there is one.
pub(super) fn look(device: u32) -> Option<Found> {
    look_in(Path::new(DIRECTORY), device)
}

fn look_in(directory: &Path, device: u32) -> Option<Found> {
    let mut file = File::open(path_in(directory, device)).ok()?;
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    let note: Note = serde_json::from_str(&text).ok()?;
    let is_kept = match File::open(lock_path_in(directory, device)) {
        Ok(lock) => rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared).is_err(),
        // Others are only told whether such a process runs.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => is_running(note.pid),
        Err(_) => false,
    };
    Some(Found { note, is_kept })
}

/// Returns whether there is a process of that number.
fn is_running(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

fn path_in(directory: &Path, device: u32) -> PathBuf {
    directory.join(format!("nbd{device}.json"))
}

fn lock_path_in(directory: &Path, device: u32) -> PathBuf {
    directory.join(format!("nbd{device}.lock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_else_can_lock_the_record_of_a_device() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut record = Record::take_in(directory.path(), 5).expect("a record");
        let note = Note { pid: std::process::id(), connections: 1 };
        record.write(&note).expect("a note");
        let mode = |path: &Path| path.metadata().expect("a file").permissions().mode() & 0o777;
        assert_eq!(mode(&record.lock_path) & 0o077, 0);
        assert_eq!(mode(&record.path) & 0o444, 0o444);
        record.remove();
        // What everybody may open decides nothing.
        let readable = path_in(directory.path(), 5);
        std::fs::write(&readable, serde_json::to_string(&note).expect("text")).expect("room");
        let foreign = File::open(&readable).expect("the note");
        rustix::fs::flock(&foreign, FlockOperation::NonBlockingLockShared).expect("a lock");
        assert_eq!(look_in(directory.path(), 5), Some(Found { note, is_kept: false }));
        Record::take_in(directory.path(), 5).expect("a record in spite of the foreign lock");
        assert!(is_running(std::process::id()) && !is_running(u32::MAX));
    }

    #[test]
    fn a_device_is_kept_by_one_process_at_a_time() {
        let directory = tempfile::tempdir().expect("a directory");
        let directory = directory.path().join("run");
        let note = Note { pid: 4711, connections: 3 };
        let mut record = Record::take_in(&directory, 5).expect("a record");
        record.write(&note).expect("a note");
        assert!(!has_lost_its_keeper_in(&directory, 5, Duration::ZERO));
        assert_eq!(look_in(&directory, 5), Some(Found { note: note.clone(), is_kept: true }));
        let error = Record::take_in(&directory, 5).expect_err("it is kept");
        assert!(error.to_string().contains("/dev/nbd5 is kept by process 4711"), "{error}");
        drop(record);
        // A process that another test is starting has the lock too, until its program runs.
        assert!(has_lost_its_keeper_in(&directory, 5, Duration::from_secs(10)));
        assert_eq!(look_in(&directory, 5), Some(Found { note, is_kept: false }));
        Record::take_in(&directory, 5).expect("a record that nobody keeps").remove();
        assert_eq!(look_in(&directory, 5), None);
        assert_eq!(look_in(&directory, 6), None);
        assert!(!has_lost_its_keeper_in(&directory, 6, Duration::from_secs(10)));
    }
}
