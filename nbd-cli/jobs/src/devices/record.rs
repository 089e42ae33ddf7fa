//! Files in `/run/nbd-cli` that tell which process keeps which device.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::error::{JobError, JobErrorKind};

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
    file: File,
    path: PathBuf,
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
        let path = path_in(directory, device);
        let failed = |error: io::Error| {
            let file = path.display();
            JobError::new(
                JobErrorKind::Device,
                format!("cannot note in '{file}' which process keeps /dev/nbd{device}: {error}"),
            )
        };
        DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(failed)?;
        let start = Instant::now();
        loop {
            let mut options = OpenOptions::new();
            let options = options.read(true).write(true).create(true).truncate(false).mode(0o644);
            let file = options.open(&path).map_err(failed)?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if is_still(&path, &file) => return Ok(Self { file, path }),
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
        self.file.set_len(0)?;
        self.file.rewind()?;
        writeln!(self.file, "{text}")
    }

    /// Removes the record of a device that is no longer attached.
    pub(super) fn remove(self) {
        // Without it, the file would be taken for that of a process that was killed.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Returns whether the process that kept a device has ended without detaching it. Waits for one that
/// may be ending.
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
    let note = serde_json::from_str(&text).ok()?;
    let locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared);
    Some(Found { note, is_kept: locked.is_err() })
}

fn path_in(directory: &Path, device: u32) -> PathBuf {
    directory.join(format!("nbd{device}.json"))
}

/// Whether the locked file still has its name.
fn is_still(path: &Path, file: &File) -> bool {
    match (std::fs::metadata(path), file.metadata()) {
        (Ok(named), Ok(open)) => (named.dev(), named.ino()) == (open.dev(), open.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
