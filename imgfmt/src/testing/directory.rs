//! A directory whose sidecar is part of a recording and crashes together with its image.

use std::io;
use std::sync::{Arc, Mutex};

use super::{Loss, Recorder, RecordingStorage, lock};
use crate::storage::{Durability, Storage as _};
use crate::units::HostOffset;

/// A directory that holds the sidecar of one image, for
/// [`OpenOptions::sidecar_directory`](crate::OpenOptions).
///
/// Its files and the directory itself are storages of a [`Recorder`]: a crash can lose unsynced
/// stores to a mapped file, and the renaming of a file.
#[derive(Debug)]
pub struct RecordedDirectory {
    recorder: Recorder,
    /// The number of the file that has the sidecar's name, from 1 on, or 0.
    directory: Arc<RecordingStorage>,
    files: Mutex<Vec<Arc<RecordingStorage>>>,
    boot_id: String,
    extent_bits: Option<u32>,
}

impl RecordedDirectory {
    /// Creates a directory of a recording with a sidecar of these bytes, or without one. `boot_id`
    /// has 36 characters.
    pub fn new(recorder: &Recorder, boot_id: &str, sidecar: Option<&[u8]>) -> Self {
        let files: Vec<_> = sidecar.into_iter().map(|bytes| recorder.storage(bytes)).collect();
        let directory = recorder.storage(&(files.len() as u64).to_le_bytes());
        Self {
            recorder: recorder.clone(),
            directory,
            files: Mutex::new(files),
            boot_id: boot_id.to_owned(),
            extent_bits: None,
        }
    }

    /// Sets the size of the extents of the activity log to 2^`extent_bits` bytes, so that a small
    /// disk can have many of them.
    #[must_use]
    pub fn with_extent_bits(mut self, extent_bits: u32) -> Self {
        self.extent_bits = Some(extent_bits);
        self
    }

    /// Returns the sidecar that is found after a crash, if any; see
    /// [`RecordingStorage::after_crash`].
    pub fn after_crash(
        &self,
        position: usize,
        loss: Loss,
        below: &mut dyn FnMut(u64) -> u64,
    ) -> Option<Vec<u8>> {
        let named = self.directory.after_crash(position, loss, below);
        let file = self.file(&named)?;
        Some(file.after_crash(position, loss, below))
    }

    /// Returns the bytes of the present sidecar, if there is one.
    pub fn content(&self) -> Option<Vec<u8>> {
        Some(self.named()?.content())
    }

    fn file(&self, number: &[u8]) -> Option<Arc<RecordingStorage>> {
        let number = u64::from_le_bytes(number.try_into().ok()?);
        lock(&self.files).get(usize::try_from(number.checked_sub(1)?).ok()?).cloned()
    }

    /// The file that has the sidecar's name.
    pub(crate) fn named(&self) -> Option<Arc<RecordingStorage>> {
        self.file(&self.directory.content())
    }

    /// Gives the sidecar's name to a file, or to none if the number is 0.
    pub(crate) fn give_name_to(directory: &RecordingStorage, number: u64) -> io::Result<()> {
        directory.write_at(HostOffset::new(0), &number.to_le_bytes(), Durability::Cached)?;
        directory.sync()
    }

    /// Creates an empty file; returns it with its number.
    pub(crate) fn create_file(&self) -> (Arc<RecordingStorage>, u64) {
        let file = self.recorder.storage(&[]);
        let mut files = lock(&self.files);
        files.push(Arc::clone(&file));
        (file, files.len() as u64)
    }

    /// The storage that holds the number of the file with the sidecar's name.
    pub(crate) fn names(&self) -> &Arc<RecordingStorage> {
        &self.directory
    }

    pub(crate) fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// The size of the extents of the activity log, as a power of two, if it is not the usual one.
    pub(crate) fn extent_bits(&self) -> Option<u32> {
        self.extent_bits
    }
}
