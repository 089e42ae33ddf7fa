//! The file that holds the guest's data: the image's own, or a data file beside it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};

use crate::backup::{ContentMask, Uuid};
use crate::error::{Error, ErrorKind, Result};
use crate::mapping::Form;
use crate::qcow2::metadata::metadata_file::MetadataFile;
use crate::storage::{Capabilities, Durability, Speed, Storage, Tracked, TryWrite, ZeroMode};
use crate::units::{GuestOffset, GuestRange, HostOffset, span};

/// By how much the file is extended at once for writes at its end, in bytes: by this part of its
/// length, within bounds.
const EXTENSION_PART: u64 = 4;
const EXTENSION_MIN: u64 = 1 << 20;
const EXTENSION_MAX: u64 = 64 << 20;
/// In place of where the file was extended to: it never is.
const NEVER: u64 = u64::MAX;
/// The same: it may have been, and is not any more, because space has become scarce.
const NO_MORE: u64 = u64::MAX - 1;

/// The destination of guest data. This type knows nothing about clusters.
#[derive(Debug)]
pub(in crate::qcow2) struct DataFile {
    metadata: Arc<MetadataFile>,
    storage: Arc<dyn Storage>,
    /// The data file, if there is one.
    attached: Option<Arc<Tracked>>,
    /// Whether data is in another file than the metadata.
    is_external: bool,
    extended_to: AtomicU64,
    encryption: Encryption,
}

/// Whether the data is encrypted.
#[derive(Debug)]
enum Encryption {
    None,
    /// The storage encrypts and decrypts it.
    #[cfg(feature = "encryption")]
    Open(crate::crypto::SumKey),
    /// It depends on places on the disk, which the storage does not know: nothing may use that.
    #[cfg(feature = "encryption")]
    Old(crate::crypto::OldAes),
    /// The key is not known: no data may be read or written.
    Locked,
}

impl DataFile {
    /// The data is in the file of the metadata, until a separate file is [attached](Self::attach).
    pub(in crate::qcow2) fn new(metadata: Arc<MetadataFile>, is_external: bool) -> Self {
        let storage = Arc::clone(&metadata.file);
        let (extended_to, encryption) = (AtomicU64::new(0), Encryption::None);
        Self { metadata, storage, attached: None, is_external, extended_to, encryption }
    }

    /// All data is encrypted from now on, in the file of the metadata.
    #[cfg(feature = "encryption")]
    pub(in crate::qcow2) fn unlock(&mut self, volume: crate::crypto::Volume) {
        let file = Arc::clone(&self.metadata.file);
        self.encryption = Encryption::Open(crate::crypto::SumKey::of(&volume));
        self.storage = Arc::new(crate::crypto::Encrypted::new(file, volume));
    }

    /// All data has the old encryption: it is read by [`read_old_aes`](Self::read_old_aes) alone.
    #[cfg(feature = "encryption")]
    pub(in crate::qcow2) fn unlock_old(&mut self, key: crate::crypto::OldAes) {
        self.encryption = Encryption::Old(key);
    }

    /// How the data differs from what its storage reads, if it does.
    pub(in crate::qcow2) fn form(&self) -> Option<Form> {
        #[cfg(feature = "encryption")]
        if let Encryption::Old(_) = &self.encryption {
            return Some(Form::Encrypted);
        }
        None
    }

    /// Reads data with the old encryption: that of the disk at `guest`, which is at `host`. Past
    /// the end of the file it is zero.
    pub(in crate::qcow2) fn read_old_aes(
        &self,
        host: HostOffset,
        guest: GuestOffset,
        buffer: &mut [u8],
    ) -> Result<()> {
        #[cfg(feature = "encryption")]
        if let Encryption::Old(key) = &self.encryption {
            let file = key.decrypted(Arc::clone(&self.metadata.file), host, guest);
            let read = file.read_at(host, buffer);
            let read = read.map_err(|error| self.metadata.io("read", error, guest))?;
            buffer[read..].fill(0);
            return Ok(());
        }
        let (_, _) = (host, buffer);
        Err(self.without_key().at(guest.bytes()))
    }

    /// What hides the sum of the content of a backup in the header.
    #[cfg_attr(not(feature = "encryption"), expect(unused_variables, reason = "nothing is hidden"))]
    pub(in crate::qcow2) fn sum_mask(&self, backup: Uuid) -> Result<ContentMask> {
        match &self.encryption {
            Encryption::None => Ok(ContentMask::none()),
            #[cfg(feature = "encryption")]
            Encryption::Open(key) => key
                .mask(backup.bytes())
                .map(ContentMask::new)
                .map_err(|error| self.metadata.named(error)),
            #[cfg(feature = "encryption")]
            Encryption::Old(_) => Err(self.without_key()),
            Encryption::Locked => Err(self.without_key()),
        }
    }

    /// The data is encrypted, and the key is not known: no data is read or written from now on.
    pub(in crate::qcow2) fn lock(&mut self) {
        self.encryption = Encryption::Locked;
    }

    /// Whether what is in the file differs from what is on the disk.
    pub(in crate::qcow2) fn is_encrypted(&self) -> bool {
        !matches!(self.encryption, Encryption::None)
    }

    /// Sets a separate file for the data; `is_synced` says that all of it is on stable storage.
    pub(in crate::qcow2) fn attach(&mut self, storage: Arc<dyn Storage>, is_synced: bool) {
        let tracked = Arc::new(Tracked::new(storage, is_synced));
        self.storage = Arc::clone(&tracked) as _;
        self.attached = Some(tracked);
    }

    /// The storage of the data as the disk has it.
    pub(in crate::qcow2) fn storage(&self) -> Result<&Arc<dyn Storage>> {
        match self.encryption {
            Encryption::None => Ok(&self.storage),
            #[cfg(feature = "encryption")]
            Encryption::Open(_) => Ok(&self.storage),
            #[cfg(feature = "encryption")]
            Encryption::Old(_) => Err(self.without_key()),
            Encryption::Locked => Err(self.without_key()),
        }
    }

    fn without_key(&self) -> Error {
        let detail = "it is encrypted, and the image was opened without the key";
        let error = Error::new(ErrorKind::KeyRequired, "use the disk of", detail);
        self.metadata.named(error)
    }

    pub(in crate::qcow2) fn capabilities(&self) -> Capabilities {
        self.storage.capabilities()
    }

    /// Whether data has a separate file, where its offsets are those of the disk.
    pub(in crate::qcow2) fn is_external(&self) -> bool {
        self.is_external
    }

    /// Writes data; `guest` is its offset on the disk, for errors.
    pub(in crate::qcow2) fn write(
        &self,
        host: HostOffset,
        data: &[u8],
        guest: GuestOffset,
    ) -> Result<()> {
        self.storage()?
            .write_at(host, data, Durability::Cached)
            .map_err(|error| self.error(error, guest))
    }

    /// Writes data if that waits for nothing but the page cache.
    pub(in crate::qcow2) fn try_write(
        &self,
        host: HostOffset,
        data: &[u8],
        guest: GuestOffset,
    ) -> Result<TryWrite> {
        self.storage()?.try_write_at(host, data).map_err(|error| self.error(error, guest))
    }

    /// Writes zeroes that take up space, as data does.
    pub(in crate::qcow2) fn write_zeroes(
        &self,
        host: HostOffset,
        length: u64,
        guest: GuestOffset,
    ) -> Result<()> {
        let storage = self.storage()?;
        // Encrypted zeroes are written like data.
        if !self.is_encrypted() {
            self.will_reach(host + length, guest)?;
        }
        storage
            .write_zeroes(host, length, ZeroMode::KeepAllocated, Speed::Any)
            .map_err(|error| self.error(error, guest))
    }

    /// Makes the file at least `end` bytes long: zeroes can be written only within it. The byte
    /// before `end` is the caller's alone and zero. The length is not set, because that would cut
    /// off what others may have written beyond `end` since.
    fn will_reach(&self, end: HostOffset, guest: GuestOffset) -> Result<()> {
        let grown = self.storage.len().and_then(|length| match length < end.bytes() {
            true => {
                let last = HostOffset::new(end.bytes() - 1);
                self.storage.write_at(last, &[0], Durability::Cached)
            }
            false => Ok(()),
        });
        grown.map_err(|error| self.error(error, guest))
    }

    /// Called before a write up to `end`: extends the file beyond that, if writes in the file are
    /// faster than writes at its end. Failures do not matter, and are not tried again for some
    /// time, or if space is scarce, as long as the image is open.
    pub(in crate::qcow2) fn extend_ahead(&self, end: HostOffset) {
        let (end, known) = (end.bytes(), self.extended_to.load(Acquire));
        // An external file has the length of the disk.
        if end <= known || self.is_external {
            return;
        }
        let part = (end / EXTENSION_PART).clamp(EXTENSION_MIN, EXTENSION_MAX);
        let target = end.saturating_add(part).next_multiple_of(EXTENSION_MIN);
        // Others do not wait until it is done: their writes extend the file themselves.
        let is_first = self.extended_to.compare_exchange(known, target, AcqRel, Acquire).is_ok();
        if is_first && let Err(error) = self.storage.extend(target) {
            match error.kind() {
                io::ErrorKind::Unsupported => self.extended_to.store(NEVER, Release),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    self.extended_to.store(NO_MORE, Release);
                }
                _ => {}
            }
        }
    }

    /// Whether the file may have been extended beyond what was written.
    pub(in crate::qcow2) fn is_extended(&self) -> bool {
        !matches!(self.extended_to.load(Acquire), 0 | NEVER)
    }

    /// Makes the file with the metadata at least `end` bytes long, where the data is in it too. No
    /// other write may run. A length takes up no space, and reads as noise if the data is
    /// encrypted.
    pub(in crate::qcow2) fn grow_to(&self, end: HostOffset) -> Result<()> {
        let grow = || {
            let file = &self.metadata.file;
            if file.len()? >= end.bytes() {
                return Ok(());
            }
            file.set_len(end.bytes()).map_err(|error| match error.kind() {
                // A device has a fixed size.
                io::ErrorKind::Unsupported => io::ErrorKind::StorageFull.into(),
                _ => error,
            })
        };
        grow().map_err(|error| self.error(error, GuestOffset::new(0)))
    }

    /// Erases a range of the disk in an external file, which must read as the disk does. In the
    /// image's own file, the entry is enough.
    pub(in crate::qcow2) fn erase(&self, range: GuestRange) -> Result<()> {
        if !self.is_external {
            return Ok(());
        }
        let length = self.storage.len().map_err(|error| self.error(error, range.offset()))?;
        let range = range.intersection(span(0, length));
        if range.is_empty() {
            return Ok(());
        }
        let offset = HostOffset::new(range.offset().bytes());
        self.storage
            .write_zeroes(offset, range.length(), ZeroMode::MayUnmap, Speed::Any)
            .map_err(|error| self.error(error, range.offset()))
    }

    /// Gives an external file the length of the disk, as QEMU does: a raw data file must equal the
    /// disk.
    pub(in crate::qcow2) fn resize(&self, old_size: u64, size: u64) -> Result<()> {
        if !self.is_external {
            return Ok(());
        }
        let name = |error| self.metadata.named(Error::from_io("resize the data file of", error));
        let length = self.storage.len().map_err(name)?;
        if size > old_size && length > old_size {
            // Bytes past the end of the disk were never part of it.
            let stale = length.min(size) - old_size;
            let start = HostOffset::new(old_size);
            let zeroed = self.storage.write_zeroes(start, stale, ZeroMode::MayUnmap, Speed::Any);
            zeroed.map_err(name)?;
        }
        match self.storage.set_len(size) {
            // A device has a fixed size.
            Err(error) if error.kind() == io::ErrorKind::Unsupported && length >= size => Ok(()),
            result => result.map_err(name),
        }
    }

    /// Whether a change of the data may not be on stable storage. No change may be in progress.
    pub(in crate::qcow2) fn may_be_unsynced(&self) -> bool {
        match &self.attached {
            Some(file) => file.may_be_unsynced(),
            None => self.metadata.may_be_unsynced(),
        }
    }

    pub(in crate::qcow2) fn sync(&self) -> Result<()> {
        self.metadata.sync_storage(&*self.storage)
    }

    fn error(&self, error: io::Error, guest: GuestOffset) -> Error {
        self.metadata.io("write to", error, guest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::metadata::metadata_file::tests::opened;
    use crate::storage::MemoryStorage;
    use crate::testing::{FailingStorage, Fault};

    fn external(bytes: &[u8]) -> (Arc<FailingStorage>, DataFile) {
        let mut data = DataFile::new(Arc::new(opened(true).1), true);
        let storage = FailingStorage::new(Arc::new(MemoryStorage::from_bytes(bytes)));
        data.attach(Arc::clone(&storage) as _, false);
        (storage, data)
    }

    fn bytes_of(data: &DataFile) -> Vec<u8> {
        let mut bytes = vec![9; data.storage.len().unwrap() as usize];
        data.storage.read_exact_at(HostOffset::new(0), &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn zeroes_past_the_end_make_the_file_longer_and_cut_off_nothing() {
        let (_, data) = external(&[1; 512]);
        data.write_zeroes(HostOffset::new(1024), 512, GuestOffset::new(1024)).unwrap();
        assert_eq!(data.storage.len().unwrap(), 1536);
        data.write_zeroes(HostOffset::new(256), 256, GuestOffset::new(256)).unwrap();
        let bytes = bytes_of(&data);
        assert_eq!((bytes.len(), bytes[255], bytes[256], bytes[1535]), (1536, 1, 0, 0));
    }

    #[test]
    fn without_the_key_neither_data_nor_its_storage_is_had() {
        let (storage, metadata) = opened(true);
        let mut data = DataFile::new(Arc::new(metadata), false);
        data.lock();
        let (calls, host, guest) = (storage.calls(), HostOffset::new(512), GuestOffset::new(0));
        let refused = [
            data.storage().map(|_| ()),
            data.write(host, &[1; 512], guest),
            data.write_zeroes(host, 512, guest),
        ];
        for refused in refused {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::KeyRequired);
        }
        assert_eq!(storage.calls(), calls);
    }

    #[test]
    fn a_storage_that_gains_nothing_by_an_extension_is_asked_once() {
        let (storage, metadata) = opened(true);
        let data = DataFile::new(Arc::new(metadata), false);
        let (calls, length) = (storage.calls(), storage.len().unwrap());
        for clusters in 1..100 {
            data.extend_ahead(HostOffset::new(length + (clusters << 20)));
        }
        assert_eq!((storage.calls() - calls, storage.len().unwrap()), (1, length));
        assert!(!data.is_extended());
    }

    #[test]
    fn when_space_is_scarce_no_more_is_taken_ahead_and_the_file_is_still_cut() {
        let (storage, metadata) = opened(true);
        let data = DataFile::new(Arc::new(metadata), false);
        let (calls, length) = (storage.calls(), storage.len().unwrap());
        storage.set_fault(Some(Fault { calls: 0..u64::MAX, code: libc::ENOSPC }));
        data.extend_ahead(HostOffset::new(length + (1 << 20)));
        storage.set_fault(None);
        for clusters in 1..100 {
            data.extend_ahead(HostOffset::new(length + (clusters << 28)));
        }
        assert_eq!(storage.calls() - calls, 1);
        assert!(data.is_extended(), "a part may have been allocated");
    }

    #[test]
    fn an_external_file_is_never_longer_than_its_disk() {
        let (storage, data) = external(&[1; 512]);
        data.extend_ahead(HostOffset::new(1 << 20));
        assert_eq!((storage.calls(), data.is_extended()), (0, false));
    }

    #[test]
    fn what_is_erased_beyond_the_end_of_an_external_file_is_zero_already() {
        let (_, data) = external(&[1; 1024]);
        data.erase(span(512, 4096)).unwrap();
        data.erase(span(4096, 8192)).unwrap();
        assert_eq!(bytes_of(&data), [[1; 512], [0; 512]].concat());
    }

    #[test]
    fn the_image_s_own_file_is_neither_erased_nor_resized() {
        let data = DataFile::new(Arc::new(opened(true).1), false);
        let before = bytes_of(&data);
        data.erase(span(0, 1 << 16)).unwrap();
        data.resize(1 << 20, 2 << 20).unwrap();
        assert!(bytes_of(&data) == before);
    }

    #[test]
    fn what_an_external_file_has_past_the_end_of_the_disk_does_not_become_part_of_it() {
        let (_, data) = external(&[1; 2048]);
        data.resize(1024, 4096).unwrap();
        assert_eq!(bytes_of(&data), [vec![1; 1024], vec![0; 3072]].concat());
        data.resize(4096, 512).unwrap();
        assert_eq!(bytes_of(&data), [1; 512]);
    }

    #[test]
    fn an_error_names_the_image_and_the_place_on_the_disk() {
        let (storage, data) = external(&[0; 512]);
        storage.set_fault(Some(Fault { calls: 0..u64::MAX, code: libc::ENOSPC }));
        let written = data.write(HostOffset::new(0), &[1; 512], GuestOffset::new(65536));
        let error = written.unwrap_err().to_string();
        assert!(error.contains("disk.qcow2") && error.contains("65536"), "{error}");
    }
}
