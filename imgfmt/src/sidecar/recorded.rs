//! A directory for tests. Its sidecar is part of a recording and crashes together with its image.

use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::file::{InitialWords, write_all};
use super::layout::{Description, Layout, LogShape};
use super::{FoundBytes, SidecarLocation, SidecarStorage};
use crate::access::Access;
use crate::options::BitmapDurability;
use crate::storage::fault::{Loss, MappedWords, Recording, RecordingStorage};
use crate::storage::{Durability, Storage};
use crate::units::HostOffset;

/// A directory that holds the sidecar of one image, for
/// [`OpenOptions::sidecar_directory`](crate::OpenOptions).
///
/// Its files and the directory itself are storages of a [`Recording`]: a crash may take away what
/// was stored in a mapped file and not synced, and that a file got its name.
#[derive(Debug)]
pub struct RecordedDirectory {
    recording: Recording,
    /// Holds which file has the sidecar's name: its number from 1 on, or 0.
    directory: Arc<RecordingStorage>,
    files: Mutex<Vec<Arc<RecordingStorage>>>,
    boot_id: String,
    extent_bits: u32,
}

impl RecordedDirectory {
    /// A directory of a recording with a sidecar of these bytes, or without one. `boot_id` has 36
    /// characters.
    pub fn new(recording: &Recording, boot_id: &str, sidecar: Option<&[u8]>) -> Self {
        let files: Vec<_> = sidecar.into_iter().map(|bytes| recording.storage(bytes)).collect();
        let directory = recording.storage(&(files.len() as u64).to_le_bytes());
        Self {
            recording: recording.clone(),
            directory,
            files: Mutex::new(files),
            boot_id: boot_id.to_owned(),
            extent_bits: LogShape::for_disk(0).extent_bits,
        }
    }

    /// Makes the extents of the activity log as large as this power of two says, so that a small
    /// disk has many of them.
    #[must_use]
    pub fn with_extent_bits(mut self, extent_bits: u32) -> Self {
        self.extent_bits = extent_bits;
        self
    }

    /// The sidecar that is found after a crash, if any; see [`RecordingStorage::after_crash`].
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

    /// The sidecar as it is now, if there is one.
    pub fn content(&self) -> Option<Vec<u8>> {
        Some(self.named()?.content())
    }

    fn files(&self) -> MutexGuard<'_, Vec<Arc<RecordingStorage>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, number: &[u8]) -> Option<Arc<RecordingStorage>> {
        let number = u64::from_le_bytes(number.try_into().ok()?);
        self.files().get(usize::try_from(number.checked_sub(1)?).ok()?).cloned()
    }

    fn named(&self) -> Option<Arc<RecordingStorage>> {
        self.file(&self.directory.content())
    }

    fn give_name_to(directory: &RecordingStorage, number: u64) -> io::Result<()> {
        directory.write_at(HostOffset::new(0), &number.to_le_bytes(), Durability::Cached)?;
        directory.sync()
    }
}

impl SidecarLocation for Arc<RecordedDirectory> {
    /// In the order in which the real directory does it.
    fn create(
        &self,
        description: &Description,
        words: InitialWords<'_>,
    ) -> io::Result<Box<dyn SidecarStorage>> {
        let layout = Layout::of(description).ok_or(io::ErrorKind::InvalidInput)?;
        let file = self.recording.storage(&[]);
        self.files().push(Arc::clone(&file));
        let number = self.files().len() as u64;
        file.set_len(layout.length)?;
        write_all(description, &layout, words, &mut |offset, bytes| {
            file.write_at(HostOffset::new(offset), bytes, Durability::Cached)
        })?;
        if description.durability == BitmapDurability::PowerLoss {
            file.sync()?;
        }
        let mapped = file.map();
        RecordedDirectory::give_name_to(&self.directory, number)?;
        let directory = Arc::clone(&self.directory);
        Ok(Box::new(RecordedSidecar { directory, number, file, mapped }))
    }

    fn open(&self, _: Access) -> io::Result<Option<Box<dyn FoundBytes>>> {
        Ok(self.named().map(|file| Box::new(file) as Box<dyn FoundBytes>))
    }

    fn remove(&self) -> io::Result<()> {
        RecordedDirectory::give_name_to(&self.directory, 0)
    }

    fn name(&self) -> String {
        "the recorded sidecar".into()
    }

    fn probe(&self, _: &Description) -> io::Result<()> {
        Ok(())
    }

    fn boot_id(&self) -> String {
        self.boot_id.clone()
    }

    fn log_shape(&self, disk_size: u64) -> LogShape {
        let shape = LogShape::for_disk(disk_size);
        LogShape { extent_bits: self.extent_bits, ..shape }
    }
}

impl FoundBytes for Arc<RecordingStorage> {
    fn length(&self) -> io::Result<u64> {
        Storage::len(&**self)
    }

    fn read_bytes(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(HostOffset::new(offset), buffer)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_at(HostOffset::new(offset), bytes, Durability::Cached)
    }
}

/// A sidecar that is mapped.
#[derive(Debug)]
struct RecordedSidecar {
    directory: Arc<RecordingStorage>,
    number: u64,
    file: Arc<RecordingStorage>,
    mapped: Arc<MappedWords>,
}

impl SidecarStorage for RecordedSidecar {
    fn words(&self) -> &[AtomicU64] {
        self.mapped.words()
    }

    fn write_durable(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_at(HostOffset::new(offset), bytes, Durability::Fua)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn remove(&self) -> io::Result<()> {
        if self.directory.content() == self.number.to_le_bytes() {
            return RecordedDirectory::give_name_to(&self.directory, 0);
        }
        Ok(())
    }
}
