//! Opens an image: everything is read and checked before it is used, and nothing is changed.

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;

use super::bitmap::Bitmaps;
use super::check::{Mode, not_repaired};
use crate::access::{Access, ExpectedEncryption};
use crate::backing_slot::BackingSlot;
use crate::error::{Error, ErrorKind, Result};
use crate::layer::Layer;
use crate::options::OpenOptions;
use crate::qcow2::alloc::allocator::{Allocator, make_allocator};
use crate::qcow2::alloc::clusters::Clusters;
use crate::qcow2::alloc::preallocated::Preallocated;
use crate::qcow2::data_file::DataFile;
use crate::qcow2::image::Qcow2;
use crate::qcow2::map::mapping_tables::MappingTables;
use crate::qcow2::metadata::commits::Commits;
use crate::qcow2::metadata::metadata_file::MetadataFile;
use crate::qcow2::on_disk::header::{ENCRYPTION_AES, Header, autoclear, field, incompatible};
use crate::qcow2::on_disk::l2::EntryFormat;
use crate::qcow2::on_disk::snapshot;
use crate::qcow2::on_disk::words::{read_error, read_words};
use crate::qcow2::purpose::Purpose;
use crate::storage::{Storage, Tracked};
use crate::units::HostOffset;

impl Qcow2 {
    /// Opens the image in `file`. Its backing file and data file must be attached afterwards.
    pub(crate) fn open(
        file: Arc<dyn Storage>,
        path: Option<&Path>,
        options: &OpenOptions,
        purpose: Purpose,
    ) -> Result<Self> {
        // From here on every change of the file is recorded.
        let tracked = Arc::new(Tracked::new(file, options.is_synced));
        let file: Arc<dyn Storage> = Arc::clone(&tracked) as _;
        let header = Header::read_or_overwrite(&*file, purpose, options.incomplete)?;
        if purpose != Purpose::Describe {
            header.refuse_to_write_old_encryption(options.access)?;
        }
        let snapshots = match purpose {
            Purpose::Use | Purpose::Describe => snapshot::read_table(&*file, &header)?,
            Purpose::Check => snapshot::read_damaged_table(&*file, &header)?.snapshots,
        };
        let allocator = allocator_for(&file, &header, options, purpose)?;
        let is_writable = allocator.is_some();
        let (l1_offset, l1_entries, size) = match &options.snapshot {
            None => (header.l1_offset, header.l1_entries, header.size),
            Some(name) => {
                let snapshot = snapshot::find(&snapshots, name)?;
                (snapshot.l1_offset, snapshot.l1_entries, snapshot.disk_size)
            }
        };
        let l1 = read_l1(&*file, l1_offset, l1_entries)?;
        let format = EntryFormat {
            geometry: header.geometry,
            version: header.version,
            has_data_file: header.has_data_file(),
        };
        let key = key_of(&*file, &header, options, purpose)?;
        let luks_header = header.stated_luks_header().unwrap_or(None);
        let snapshots_offset = header.snapshots_offset;
        let metadata = Arc::new(MetadataFile::new(tracked, path, header, is_writable));
        let preallocated = Preallocated::new(Arc::clone(&metadata));
        let data = data_file(&metadata, key);
        let commits = Arc::new(Commits::default());
        let clusters = Clusters::new(Arc::clone(&metadata), Arc::clone(&commits), allocator);
        let clusters = Arc::new(clusters);
        let (of_bitmaps, parts) = (
            (Arc::clone(&metadata), Arc::clone(&clusters)),
            (Arc::clone(&metadata), Arc::clone(&clusters), Arc::clone(&commits)),
        );
        let bitmaps = match &options.snapshot {
            None => Bitmaps::open(of_bitmaps, options),
            // Bitmaps describe the present state.
            Some(_) => Bitmaps::none(of_bitmaps, size),
        };
        let mut mapping = MappingTables::new(parts, format, l1, size, options.metadata_cache_bytes);
        mapping.note_luks_header(luks_header);
        mapping.note_snapshots(snapshots_offset, &snapshots);
        if purpose == Purpose::Use {
            mapping.note_metadata();
        }
        Ok(Self {
            data,
            metadata,
            clusters,
            mapping,
            commits,
            size,
            preallocated,
            backing: BackingSlot::default(),
            bitmaps,
        })
    }

    /// The backing file's name and format, if the image has one.
    pub(crate) fn backing_name(&self) -> Option<(OsString, Option<String>)> {
        let header = self.metadata.header();
        Some((header.backing_name.clone()?, header.extensions.backing_format.clone()))
    }

    /// The data file's name, if the image keeps its data in another file.
    pub(crate) fn data_file_name(&self) -> Option<OsString> {
        let header = self.metadata.header();
        header.extensions.data_file_name.clone().filter(|_| header.has_data_file())
    }

    /// Makes the last preparations for writing, once the whole chain has been opened.
    pub(crate) fn begin_writing(&mut self) -> Result<()> {
        let sidecar = self.bitmaps.find_sidecar()?;
        if !self.metadata.is_writable() || self.mapping.format.version < 3 {
            self.prove_refcount_blocks();
            return sidecar.map_or(Ok(()), |found| self.bitmaps.recover_all(self, found));
        }
        if self.metadata.header().incompatible & incompatible::DIRTY != 0 {
            let report = self.check_with_sidecar(Mode::Automatic)?;
            if report.corruptions > 0 {
                return Err(not_repaired(&report));
            }
            let header = self.metadata.header();
            // The repair has changed COPIED bits in the file.
            let (offset, entries) = (header.l1_offset, header.l1_entries as usize);
            let l1 = read_words(&*self.metadata.file, offset, entries)?;
            self.mapping.replace_l1(l1);
            self.mapping.forget_tables(self.size);
        }
        self.prove_refcount_blocks();
        // Unknown structures are not kept up to date: record that before the first write.
        let ours = autoclear::LINEAGE | autoclear::SEAL;
        // This bit is cleared when the bits of the sidecar are in the image.
        let ours = ours | if let Some(Ok(_)) = sidecar { autoclear::SIDECAR } else { 0 };
        let header = self.metadata.header();
        let known = header.kept_autoclear() | header.autoclear & ours;
        if known != header.autoclear {
            self.metadata.write_header(field::AUTOCLEAR, &known.to_be_bytes())?;
            self.metadata.sync_header()?;
        }
        self.bitmaps.begin_recording();
        sidecar.map_or(Ok(()), |found| self.bitmaps.recover_all(self, found))?;
        self.bitmaps.thaw_at_open(self);
        Ok(())
    }

    /// Where refcount blocks do not count themselves, as after a repair, their refcounts do not
    /// show whether they are something else as well. Then all references to them are counted, once.
    fn prove_refcount_blocks(&self) {
        let Ok(allocator) = self.clusters.allocator() else { return };
        if !allocator.refcounts.has_strangers() {
            return;
        }
        let blocks = allocator.refcounts.block_clusters();
        drop(allocator);
        // An unreadable structure is reported by the first operation that needs it.
        let is_sound = self.refcounts_overlap_nothing(&blocks).unwrap_or(false);
        let Ok(mut allocator) = self.clusters.allocator() else { return };
        match is_sound {
            true => allocator.refcounts.trust_all(),
            false => allocator.refcounts.trust_none(),
        }
    }

    /// Whether unallocated clusters show a backing file: now, or, if it is ignored now, when the
    /// image is opened the next time.
    pub(super) fn names_backing(&self) -> bool {
        self.backing.with(|backing| backing.is_some())
            || self.metadata.header().backing_name.is_some()
    }

    /// Puts a layer below the image, which is itself below another one.
    pub(crate) fn fix_backing(&mut self, layer: Arc<dyn Layer>) {
        self.backing.fix(layer);
    }

    /// Puts the first of these layers below the image; the others are below that one.
    pub(crate) fn attach_backing(&mut self, layers: &Arc<[Arc<dyn Layer>]>) {
        self.backing.attach(layers);
    }

    pub(crate) fn attach_data_file(&mut self, data: Arc<dyn Storage>, is_synced: bool) {
        self.data.attach(data, is_synced);
    }
}

/// Refuses to write what this crate would damage.
fn refuse_unwritable(header: &Header, options: &OpenOptions) -> Result<()> {
    if options.snapshot.is_some() {
        let detail = "a snapshot can only be read; open it read-only";
        return Err(Error::new(ErrorKind::InvalidInput, "open", detail));
    }
    if header.incompatible & incompatible::CORRUPT != 0 {
        let detail = "it is marked as damaged; repair it with 'nbd-cli image check --repair all', or \
                      open it read-only";
        return Err(Error::new(ErrorKind::Corrupt, "open", detail));
    }
    Ok(())
}

fn read_l1(file: &dyn Storage, offset: HostOffset, entries: u32) -> Result<Vec<u64>> {
    match offset.bytes() < file.len().map_err(read_error)? {
        true => read_words(file, offset, entries as usize),
        // It is being checked.
        false => Ok(vec![0; entries as usize]),
    }
}

/// The place of the data: encrypted data without a key is never read or written.
fn data_file(metadata: &Arc<MetadataFile>, key: Option<Key>) -> DataFile {
    let header = metadata.header();
    let mut data = DataFile::new(Arc::clone(metadata), header.has_data_file());
    match key {
        #[cfg(feature = "encryption")]
        Some(Key::Luks(volume)) => data.unlock(volume),
        #[cfg(feature = "encryption")]
        Some(Key::OldAes(key)) => data.unlock_old(key),
        _ if header.encryption_method != 0 => data.lock(),
        _ => {}
    }
    data
}

/// What decrypts the data.
#[cfg(feature = "encryption")]
enum Key {
    Luks(crate::crypto::Volume),
    OldAes(crate::crypto::OldAes),
}
#[cfg(not(feature = "encryption"))]
type Key = std::convert::Infallible;

/// Opens the encryption of the data, if it is to be read or written.
fn key_of(
    file: &dyn Storage,
    header: &Header,
    options: &OpenOptions,
    purpose: Purpose,
) -> Result<Option<Key>> {
    if purpose != Purpose::Use {
        return Ok(None);
    }
    let is_old = header.encryption_method == ENCRYPTION_AES;
    let place = header.luks_header()?.map(|(offset, length)| (offset.bytes(), length));
    if !is_old && place.is_none() || is_old && options.encryption == ExpectedEncryption::Luks {
        return match options.encryption {
            ExpectedEncryption::AsFound => Ok(None),
            ExpectedEncryption::Luks => {
                let detail = "No encryption in image header, but options specified format 'luks'";
                Err(Error::new(ErrorKind::InvalidInput, "open", detail))
            }
        };
    }
    if header.has_data_file() {
        let detail = "it is encrypted and has a data file, which is not supported together";
        return Err(Error::new(ErrorKind::Unsupported, "open", detail));
    }
    unlock(file, place, options).map(Some)
}

#[cfg(feature = "encryption")]
fn unlock(file: &dyn Storage, luks: Option<(u64, u64)>, options: &OpenOptions) -> Result<Key> {
    use crate::crypto::{OldAes, luks::unlock_within};

    match luks {
        Some(place) => unlock_within(file, place, &options.passphrases).map(Key::Luks),
        None => OldAes::new(&options.passphrases).map(Key::OldAes),
    }
}

#[cfg(not(feature = "encryption"))]
fn unlock(_: &dyn Storage, _: Option<(u64, u64)>, _: &OpenOptions) -> Result<Key> {
    let detail = "it is encrypted, and this program was built without encryption";
    Err(Error::new(ErrorKind::Unsupported, "open", detail))
}

/// Reads the refcounts, if the image is opened for writing. Nothing is changed yet.
fn allocator_for(
    file: &Arc<dyn Storage>,
    header: &Header,
    options: &OpenOptions,
    purpose: Purpose,
) -> Result<Option<Allocator>> {
    match (options.access, purpose) {
        (Access::ReadOnly, _) => return Ok(None),
        (Access::ReadWrite, Purpose::Check) => {}
        (Access::ReadWrite, Purpose::Use | Purpose::Describe) => {
            refuse_unwritable(header, options)?;
        }
    }
    make_allocator(file, header).map(Some)
}
