//! Opening: everything is read and checked before anything is believed, and nothing is changed.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use super::alloc::{Allocator, TablePlace};
use super::cache::TableCache;
use super::header::{Header, autoclear, field, incompatible, read_error, unsupported};
use super::l2::EntryFormat;
use super::refcount::Refcounts;
use super::snapshot::{self, Snapshot};
use super::writer::Writer;
use super::{Backing, Qcow2};
use crate::driver::Driver;
use crate::error::{Error, ErrorKind, Result};
use crate::options::{Access, OpenOptions};
use crate::storage::Storage;
use crate::units::HostOffset;

/// Unless the user says otherwise, L2 tables take up no more memory than this.
const CACHE_BYTES_DEFAULT: u64 = 32 << 20;

impl Qcow2 {
    /// Opens the image in `file`. Its backing file and data file must be attached afterwards.
    pub(crate) fn open(
        file: Arc<dyn Storage>,
        path: Option<&Path>,
        options: &OpenOptions,
    ) -> Result<Self> {
        let header = Header::read(&*file)?;
        let snapshots = snapshot::read_table(&*file, &header)?;
        let writer = match options.access {
            Access::ReadOnly => None,
            Access::ReadWrite => Some(prepare_writer(&file, &header, options)?),
        };
        let (l1_offset, l1_entries, size) = match &options.snapshot {
            None => (header.l1_offset, header.l1_entries, header.size),
            Some(name) => {
                let snapshot = find_snapshot(&snapshots, name)?;
                (snapshot.l1_offset, snapshot.l1_entries, snapshot.disk_size)
            }
        };
        let l1 = read_words(&*file, l1_offset, l1_entries as usize)?;
        let geometry = header.geometry;
        let tables_bytes = geometry.l1_entries_for(size).saturating_mul(geometry.cluster_size());
        let cache_bytes =
            options.metadata_cache_bytes.unwrap_or(CACHE_BYTES_DEFAULT).min(tables_bytes);
        let tables_max = (cache_bytes / geometry.cluster_size()).max(4) as usize;
        let format = EntryFormat {
            geometry,
            version: header.version,
            has_data_file: header.has_data_file(),
        };
        Ok(Self {
            data: Arc::clone(&file),
            file,
            path: path.map(Path::to_owned),
            header,
            format,
            size,
            l1: l1.into_iter().map(AtomicU64::new).collect(),
            tables: TableCache::new(tables_max),
            backing: None,
            writer,
            decompressed: Mutex::new(VecDeque::new()),
        })
    }

    /// The backing file's name and format, if the image has one.
    pub(crate) fn backing_name(&self) -> Option<(&str, Option<&str>)> {
        let name = self.header.backing_name.as_deref()?;
        Some((name, self.header.extensions.backing_format.as_deref()))
    }

    /// The data file's name, if the image keeps its data in another file.
    pub(crate) fn data_file_name(&self) -> Result<Option<&str>> {
        if !self.header.has_data_file() {
            return Ok(None);
        }
        match self.header.extensions.data_file_name.as_deref() {
            Some(name) => Ok(Some(name)),
            None => {
                Err(super::header::invalid("it keeps its data in a file that it does not name"))
            }
        }
    }

    /// Makes the last preparations for writing, once the whole chain has been opened.
    pub(crate) fn begin_writing(&self) -> Result<()> {
        if self.writer.is_none() || self.header.version < 3 {
            return Ok(());
        }
        // What we do not know we cannot keep up to date: say so before the first write.
        let known = self.header.autoclear & autoclear::RAW_DATA_FILE;
        if known != self.header.autoclear {
            self.write_metadata(field::AUTOCLEAR, &known.to_be_bytes())?;
            self.sync_file()?;
        }
        Ok(())
    }

    pub(crate) fn attach_backing(&mut self, driver: Box<dyn Driver>) {
        self.backing = Some(Backing { size: driver.size(), driver });
    }

    pub(crate) fn attach_data_file(&mut self, data: Arc<dyn Storage>) {
        self.data = data;
    }
}

/// Checks that the image may be written, and reads what is needed for it. Nothing is changed yet.
fn prepare_writer(
    file: &Arc<dyn Storage>,
    header: &Header,
    options: &OpenOptions,
) -> Result<Writer> {
    if options.snapshot.is_some() {
        let detail = "a snapshot can only be read; open it read-only";
        return Err(Error::new(ErrorKind::InvalidInput, "open", detail));
    }
    if header.incompatible & incompatible::CORRUPT != 0 {
        let detail = "it is marked as damaged; repair it with 'qemu-img check -r all', or open it \
                      read-only";
        return Err(Error::new(ErrorKind::Corrupt, "open", detail));
    }
    if header.incompatible & incompatible::DIRTY != 0 {
        return Err(unsupported(
            "it was not closed properly and its refcounts may be wrong; repair it with \
             'qemu-img check -r all', or open it read-only",
        ));
    }
    if header.autoclear & autoclear::BITMAPS != 0 {
        return Err(unsupported(
            "it has dirty bitmaps, which this version cannot keep up to date; remove them with \
             'qemu-img bitmap --remove', or open it read-only",
        ));
    }
    let geometry = header.geometry;
    let table_place = TablePlace {
        offset: header.refcount_table_offset,
        clusters: u64::from(header.refcount_table_clusters),
    };
    let table_bytes = table_place.clusters * geometry.cluster_size();
    let table = read_words(&**file, table_place.offset, (table_bytes / 8) as usize)?;
    let length = file.len().map_err(read_error)?;
    let refcounts = Refcounts::new(Arc::clone(file), geometry, table);
    let mut allocator = Allocator::new(refcounts, table_place, length);
    let l1_end = header.l1_offset + u64::from(header.l1_entries) * 8;
    allocator.protected = vec![
        (0, geometry.cluster_size()),
        (header.l1_offset, l1_end),
        (table_place.offset, table_place.offset + table_bytes),
    ];
    Ok(Writer::new(allocator))
}

fn find_snapshot<'a>(snapshots: &'a [Snapshot], name: &str) -> Result<&'a Snapshot> {
    let by_id = snapshots.iter().find(|snapshot| snapshot.id == name);
    let found = by_id.or_else(|| snapshots.iter().find(|snapshot| snapshot.name == name));
    found.ok_or_else(|| {
        let names: Vec<_> = snapshots.iter().map(|snapshot| snapshot.name.as_str()).collect();
        let detail =
            format!("it has no snapshot '{name}'; it has: {}", names.join(", ").escape_debug());
        Error::new(ErrorKind::NotFound, "open", detail)
    })
}

/// Reads a table of 64-bit words.
pub(super) fn read_words(storage: &dyn Storage, offset: u64, count: usize) -> Result<Vec<u64>> {
    let mut bytes = vec![0; count * 8];
    let read = storage.read_at(HostOffset::new(offset), &mut bytes).map_err(read_error)?;
    // A table may end in the middle of the file's last cluster: the rest is zero.
    bytes[read..].fill(0);
    Ok(bytes.chunks_exact(8).map(|word| super::header::u64_at(word, 0)).collect())
}
