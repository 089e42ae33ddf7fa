//! The file that holds an image's metadata, and its header.
//!
//! All writes except those of tables and of guest data pass through here: marks, edits of the
//! header, and syncs whose failure has to be recorded.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64};

use crate::error::{Error, ErrorKind, Result};
use crate::ordered_lock::{OrderedMutex, OrderedRwLock, rank};
use crate::qcow2::on_disk::header::{Header, autoclear};
use crate::qcow2::on_disk::snapshot::{self, Snapshot};
use crate::sidecar::Sidecar;
use crate::storage::{Durability, Storage, Tracked};
use crate::units::{GuestOffset, HostOffset};

/// The file that holds the metadata of one open image. It also holds the data, unless there is a
/// data file.
#[derive(Debug)]
pub(in crate::qcow2) struct MetadataFile {
    pub(in crate::qcow2) file: Arc<dyn Storage>,
    /// The same storage.
    tracked: Arc<Tracked>,
    path: Option<PathBuf>,
    is_writable: bool,
    /// The header, including changes that are not written yet.
    header: OrderedRwLock<{ rank::HEADER }, Arc<Header>>,
    /// Held while header extensions or autoclear bits change.
    header_edit: OrderedMutex<{ rank::HEADER_EDIT }, ()>,
    /// Writes to the header that may not be on disk, by their offset.
    header_writes: OrderedMutex<{ rank::HEADER_WRITES }, BTreeMap<u64, Vec<u8>>>,
    /// Whether the header says that the image is a backup and has not changed since.
    pub(super) is_sealed: AtomicBool,
    /// Whether the metadata is damaged, so that nothing may be changed any more.
    pub(super) is_corrupt: AtomicBool,
    /// Counts failed syncs.
    pub(super) failed_syncs: AtomicU64,
    pub(super) reported_syncs: AtomicU64,
    /// The operating system's error code of the last one.
    pub(super) failed_sync_code: AtomicI32,
    /// The sidecar to which the modification time of the file matters.
    sidecar: OrderedMutex<{ rank::SIDECAR }, Option<Arc<Sidecar>>>,
}

impl MetadataFile {
    pub(in crate::qcow2) fn new(
        file: Arc<Tracked>,
        path: Option<&Path>,
        header: Header,
        is_writable: bool,
    ) -> Self {
        Self {
            file: Arc::clone(&file) as _,
            tracked: file,
            path: path.map(Path::to_owned),
            is_writable,
            is_sealed: AtomicBool::new(header.autoclear & autoclear::SEAL != 0),
            header: OrderedRwLock::new(Arc::new(header)),
            header_edit: OrderedMutex::default(),
            header_writes: OrderedMutex::default(),
            is_corrupt: AtomicBool::new(false),
            failed_syncs: AtomicU64::new(0),
            reported_syncs: AtomicU64::new(0),
            failed_sync_code: AtomicI32::new(0),
            sidecar: OrderedMutex::default(),
        }
    }

    pub(in crate::qcow2) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Whether the image was opened for writing.
    pub(in crate::qcow2) fn is_writable(&self) -> bool {
        self.is_writable
    }

    /// Refuses to change an image that was opened read-only.
    pub(in crate::qcow2) fn refuse_unwritable(&self) -> Result<()> {
        if self.is_writable { Ok(()) } else { Err(unwritable()) }
    }

    /// The present header.
    pub(in crate::qcow2) fn header(&self) -> Arc<Header> {
        Arc::clone(&self.header.read())
    }

    /// The snapshots in the order in which they were made.
    pub(in crate::qcow2) fn snapshots(&self) -> Result<Vec<Snapshot>> {
        snapshot::read_table(&*self.file, &self.header())
    }

    /// Changes the header in memory; the caller writes it.
    pub(in crate::qcow2) fn update_header(&self, update: impl FnOnce(&mut Header)) {
        let mut header = self.header.write();
        update(Arc::make_mut(&mut header));
    }

    /// Writes to the file. The write may not be on disk before a sync.
    pub(in crate::qcow2) fn write(&self, offset: HostOffset, bytes: &[u8]) -> Result<()> {
        self.note_alive();
        self.file
            .write_at(offset, bytes, Durability::Cached)
            .map_err(|error| Error::from_io("write the metadata of", error).at(offset.bytes()))
            .map_err(|error| self.named(error))
    }

    /// Syncs the file.
    pub(in crate::qcow2) fn sync(&self) -> Result<()> {
        self.sync_storage(&*self.file)
    }

    /// Whether a change of the file may not be on stable storage. No change may be in progress.
    pub(in crate::qcow2) fn may_be_unsynced(&self) -> bool {
        self.tracked.may_be_unsynced()
    }

    /// Syncs the file or the data file.
    pub(in crate::qcow2) fn sync_storage(&self, storage: &dyn Storage) -> Result<()> {
        let synced = storage.sync();
        let synced = synced.map_err(|error| self.named(Error::from_io("flush", error).of_sync()));
        self.count_failed(synced)
    }

    /// Writes fields of the header. They are valid at once, but may not be on disk until
    /// [`sync_header`](Self::sync_header) succeeds.
    pub(in crate::qcow2) fn write_header(&self, place: u64, bytes: &[u8]) -> Result<()> {
        let mut writes = self.header_writes.lock();
        self.write(HostOffset::new(place), bytes)?;
        writes.insert(place, bytes.to_vec());
        Ok(())
    }

    /// Syncs the header. If that fails, the next flush writes its changes again: the kernel may
    /// have dropped them.
    pub(in crate::qcow2) fn sync_header(&self) -> Result<()> {
        let writes = self.header_writes.lock().clone();
        self.sync()?;
        self.header_writes.lock().retain(|place, bytes| writes.get(place) != Some(bytes));
        Ok(())
    }

    /// Whether written fields of the header may not be on disk.
    pub(in crate::qcow2) fn has_header_writes(&self) -> bool {
        !self.header_writes.lock().is_empty()
    }

    /// Writes these fields again, and syncs.
    pub(in crate::qcow2) fn repeat_header_writes(&self) -> Result<()> {
        {
            let writes = self.header_writes.lock();
            if writes.is_empty() {
                return Ok(());
            }
            // The structures that they point to were on disk before the first write.
            for (place, bytes) in &*writes {
                self.write(HostOffset::new(*place), bytes)?;
            }
        }
        self.sync_header()
    }

    /// Edits header extensions or autoclear bits in the file, one edit at a time. `edit` is given
    /// the file and the size of its first cluster in bytes, and syncs; see
    /// [`header_edit`](crate::qcow2::metadata::header_edit).
    pub(in crate::qcow2) fn edit_header<T>(
        &self,
        edit: impl FnOnce(&dyn Storage, u64) -> Result<T>,
    ) -> Result<T> {
        let cluster_size = self.header().geometry.cluster_size();
        let _editing = self.header_edit.lock();
        self.count_failed(edit(&*self.file, cluster_size).map_err(|error| self.named(error)))
    }

    /// As [`edit_header`](Self::edit_header), for an edit that writes all of the first sector: no
    /// field of the header is written meanwhile.
    pub(in crate::qcow2) fn edit_first_sector<T>(
        &self,
        edit: impl FnOnce(&dyn Storage) -> Result<T>,
    ) -> Result<T> {
        self.edit_header(|file, _| {
            let _fields = self.header_writes.lock();
            self.note_alive();
            edit(file)
        })
    }

    /// Sets the sidecar that is stamped whenever the file changes; `None` ends that.
    pub(in crate::qcow2) fn stamp_sidecar(&self, sidecar: Option<Arc<Sidecar>>) {
        *self.sidecar.lock() = sidecar;
    }

    /// Records a change of the file by this process, which updates its modification time.
    pub(in crate::qcow2) fn note_alive(&self) {
        if let Some(sidecar) = &*self.sidecar.lock() {
            sidecar.note_alive();
        }
    }

    /// Adds the image's path to the error.
    pub(in crate::qcow2) fn named(&self, error: Error) -> Error {
        match &self.path {
            Some(path) => error.with_path(path),
            None => error,
        }
    }

    /// The error of an operation on the file or the data file, for bytes of the disk.
    pub(in crate::qcow2) fn io(
        &self,
        operation: &'static str,
        error: std::io::Error,
        guest: GuestOffset,
    ) -> Error {
        self.named(Error::from_io(operation, error).at(guest.bytes()))
    }

    /// The error of invalid metadata.
    pub(in crate::qcow2) fn corrupt(&self, detail: &str, offset: u64) -> Error {
        let detail =
            format!("its metadata is damaged: {detail}; check it with 'nbd-cli image check'");
        self.named(Error::new(ErrorKind::Corrupt, "use", detail).at(offset))
    }
}

/// The error of a change to an image that was opened read-only.
pub(in crate::qcow2) fn unwritable() -> Error {
    Error::new(ErrorKind::ReadOnly, "change", "the image was opened read-only")
}

#[cfg(test)]
pub(in crate::qcow2) mod tests {
    use super::*;
    use crate::qcow2::on_disk::header::{MAGIC, field};
    use crate::qcow2::purpose::Purpose;
    use crate::storage::MemoryStorage;
    use crate::testing::FailingStorage;

    /// An empty image of version 3 with clusters of 64 KiB: header, refcount table, refcount block
    /// and L1 table.
    pub(in crate::qcow2) fn opened(is_writable: bool) -> (Arc<FailingStorage>, MetadataFile) {
        let mut bytes = vec![0; 4 << 16];
        bytes[..4].copy_from_slice(&MAGIC);
        for (at, value) in [(4, 3u32), (20, 16), (36, 1), (56, 1), (96, 4), (100, 104)] {
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        }
        for (at, value) in [(24, 1u64 << 20), (40, 3 << 16), (48, 1 << 16)] {
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        bytes[1 << 16..][..8].copy_from_slice(&(2u64 << 16).to_be_bytes());
        bytes[2 << 16..][..8].copy_from_slice(&[0, 1].repeat(4));
        let storage = FailingStorage::new(Arc::new(MemoryStorage::from_bytes(&bytes)));
        let header = Header::read(&*storage, Purpose::Use).unwrap();
        let path = Some(Path::new("disk.qcow2"));
        let tracked = Arc::new(Tracked::new(Arc::clone(&storage) as _, false));
        let file = MetadataFile::new(tracked, path, header, is_writable);
        (storage, file)
    }

    fn field_of(storage: &FailingStorage, place: u64) -> u64 {
        let mut bytes = [0; 8];
        storage.read_exact_at(HostOffset::new(place), &mut bytes).unwrap();
        u64::from_be_bytes(bytes)
    }

    #[test]
    fn fields_of_the_header_that_a_failed_sync_lost_are_written_again() {
        let (storage, file) = opened(true);
        storage.lose_at_sync(0).unwrap();
        file.write_header(field::SIZE, &(2u64 << 20).to_be_bytes()).unwrap();
        let since = file.failed_syncs();
        assert!(file.sync_header().is_err());
        assert_eq!(field_of(&storage, field::SIZE), 1 << 20);
        assert!(file.has_header_writes() && file.refuse_lost_since(since).is_err());
        file.repeat_header_writes().unwrap();
        assert_eq!(field_of(&storage, field::SIZE), 2 << 20);
        assert!(!file.has_header_writes());
    }

    #[test]
    fn a_failed_edit_of_the_header_names_the_image_and_is_reported_by_one_flush() {
        let (storage, file) = opened(true);
        storage.lose_at_sync(0).unwrap();
        let edited = file.edit_header(|file, _| {
            assert_eq!(file.len().unwrap(), 4 << 16);
            crate::qcow2::metadata::header_edit::change_autoclear(file, 1, 0)
        });
        assert!(edited.unwrap_err().to_string().contains("disk.qcow2"));
        assert!(file.report_failed(Ok(())).is_err());
        assert!(file.report_failed(Ok(())).is_ok());
    }

    #[test]
    fn damage_marks_an_image_that_is_open_for_writing_and_no_other() {
        let damage = |file: &MetadataFile| file.note_damage(file.corrupt("it is wrong", 5));
        let (storage, file) = opened(true);
        file.mark_dirty(true).unwrap();
        file.refuse_if_corrupt().unwrap();
        damage(&file);
        assert!(file.refuse_if_corrupt().is_err());
        assert_eq!(field_of(&storage, field::INCOMPATIBLE), 0b11);
        let (storage, file) = opened(false);
        damage(&file);
        file.refuse_if_corrupt().unwrap();
        assert_eq!(field_of(&storage, field::INCOMPATIBLE), 0);
    }
}
