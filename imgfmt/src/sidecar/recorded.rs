//! The sidecar in a [`RecordedDirectory`], for tests.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::file::write_all;
use super::layout::{Description, Layout, LogShape};
use super::location::{FoundBytes, InitialWords, SidecarLocation, SidecarStorage};
use crate::access::{Access, BitmapDurability};
use crate::storage::{Durability, Storage};
use crate::testing::{MappedWords, RecordedDirectory, RecordingStorage};
use crate::units::HostOffset;

impl SidecarLocation for Arc<RecordedDirectory> {
    /// In the same order as for a real directory.
    fn create(
        &self,
        description: &Description,
        words: InitialWords<'_>,
    ) -> io::Result<Box<dyn SidecarStorage>> {
        let layout = Layout::of(description).ok_or(io::ErrorKind::InvalidInput)?;
        let (file, number) = self.create_file();
        file.set_len(layout.length)?;
        write_all(description, &layout, words, &mut |offset, bytes| {
            file.write_at(HostOffset::new(offset), bytes, Durability::Cached)
        })?;
        if description.durability == BitmapDurability::PowerLoss {
            file.sync()?;
        }
        let mapped = file.map();
        RecordedDirectory::give_name_to(self.names(), number)?;
        let directory = Arc::clone(self.names());
        Ok(Box::new(RecordedSidecar { directory, number, file, mapped }))
    }

    fn open(&self, _: Access) -> io::Result<Option<Box<dyn FoundBytes>>> {
        Ok(self.named().map(|file| Box::new(file) as Box<dyn FoundBytes>))
    }

    fn remove(&self) -> io::Result<()> {
        RecordedDirectory::give_name_to(self.names(), 0)
    }

    fn name(&self) -> String {
        "the recorded sidecar".into()
    }

    fn probe(&self, _: &Description) -> io::Result<()> {
        Ok(())
    }

    fn boot_id(&self) -> String {
        RecordedDirectory::boot_id(self).to_owned()
    }

    fn log_shape(&self, disk_size: u64) -> LogShape {
        let shape = LogShape::for_disk(disk_size);
        LogShape { extent_bits: self.extent_bits().unwrap_or(shape.extent_bits), ..shape }
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
