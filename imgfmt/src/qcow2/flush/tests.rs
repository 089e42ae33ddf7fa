//! A flush that fails at any call, and what is counted on disk meanwhile.

use std::sync::Arc;

use super::*;
use crate::qcow2::alloc::allocator::make_allocator;
use crate::qcow2::alloc::clusters::tests::Nothing;
use crate::qcow2::map::tables::Change;
use crate::qcow2::metadata::metadata_file::tests::opened;
use crate::qcow2::on_disk::l2::{Cluster, EntryFormat, table_of};
use crate::storage::{MemoryStorage, Storage};
use crate::testing::{FailingStorage, Fault};
use crate::units::{GuestOffset, HostOffset};

const CLUSTER: u64 = 1 << 16;
/// The start of the disk.
const START: GuestOffset = GuestOffset::new(0);

/// The parts of an empty image: header, refcount table, refcount block, L1 table.
struct Parts {
    storage: Arc<FailingStorage>,
    metadata: Arc<MetadataFile>,
    data: DataFile,
    clusters: Arc<Clusters>,
    mapping: MappingTables,
    commits: Arc<Commits>,
}

impl Parts {
    fn new() -> Self {
        let (storage, metadata) = opened(true);
        let (metadata, commits) = (Arc::new(metadata), Arc::new(Commits::default()));
        let header = metadata.header();
        let allocator = make_allocator(&metadata.file, &header).unwrap();
        let clusters = Clusters::new(Arc::clone(&metadata), Arc::clone(&commits), Some(allocator));
        let clusters = Arc::new(clusters);
        let format = EntryFormat { geometry: header.geometry, version: 3, has_data_file: false };
        let of_mapping = (Arc::clone(&metadata), Arc::clone(&clusters), Arc::clone(&commits));
        let mapping = MappingTables::new(of_mapping, format, vec![0], header.size, None);
        let data = DataFile::new(Arc::clone(&metadata), false);
        Self { storage, metadata, data, clusters, mapping, commits }
    }

    fn flusher(&self) -> Flusher<'_> {
        Flusher {
            metadata: &self.metadata,
            data: &self.data,
            clusters: &self.clusters,
            mapping: &self.mapping,
            commits: &self.commits,
            is_alone: false,
        }
    }

    /// Writes the first cluster of the disk to a new place.
    fn write_first_cluster(&self) -> HostOffset {
        let table = self.mapping.table_for_write(GuestOffset::new(0), &Nothing).unwrap();
        let host = self.clusters.reserve(1, &Nothing).unwrap().offset;
        self.data.write(host, &[7; CLUSTER as usize], START).unwrap();
        let cluster =
            Cluster { host: Some(host), copied: true, allocated: 1, ..Cluster::default() };
        self.mapping.commit(&table, &[Change { guest: START, cluster }], &[]).unwrap();
        host
    }

    fn word(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.storage.read_exact_at(HostOffset::new(offset), &mut bytes).unwrap();
        u64::from_be_bytes(bytes)
    }

    fn refcount(&self, offset: HostOffset) -> u16 {
        let mut bytes = [0; 2];
        let place = 2 * CLUSTER + offset.bytes() / CLUSTER * 2;
        self.storage.read_exact_at(HostOffset::new(place), &mut bytes).unwrap();
        u16::from_be_bytes(bytes)
    }

    /// Where the first cluster of the disk is, if the file says so; what it names is counted.
    fn first_cluster(&self) -> Option<HostOffset> {
        let counted = |entry| {
            let offset = table_of(entry)?;
            assert!(self.refcount(offset) > 0, "{offset} is not counted");
            Some(offset)
        };
        // An L2 entry without flags but COPIED is laid out as an L1 entry is.
        let table = counted(self.word(3 * CLUSTER))?;
        counted(self.word(table.bytes()))
    }
}

#[test]
fn a_flush_that_fails_at_any_call_leaves_nothing_uncounted_and_the_next_makes_up_for_it() {
    for call in 0.. {
        let parts = Parts::new();
        let host = parts.write_first_cluster();
        let begun = parts.storage.calls() + call;
        parts.storage.set_fault(Some(Fault { calls: begun..begun + 1, code: libc::EIO }));
        let flushed = parts.flusher().flush();
        parts.storage.set_fault(None);
        assert!(parts.first_cluster().is_none_or(|found| found == host));
        let has_failed = parts.storage.failed() > 0;
        assert_eq!(flushed.is_err(), has_failed, "call {call}");
        assert_eq!(parts.flusher().has_changes(), has_failed, "call {call}");
        parts.flusher().flush().unwrap();
        assert_eq!(parts.first_cluster(), Some(host), "call {call}");
        if !has_failed {
            assert!(call > 4, "a flush has at least so many steps");
            break;
        }
    }
}

#[test]
fn a_flush_that_finds_nothing_changed_is_one_sync() {
    let parts = Parts::new();
    parts.write_first_cluster();
    parts.flusher().flush().unwrap();
    let before = parts.storage.calls();
    parts.flusher().flush().unwrap();
    assert_eq!(parts.storage.calls() - before, 1);
}

#[test]
fn the_first_flush_covers_tables_that_a_killed_process_wrote_beside_a_data_file() {
    let mut parts = Parts::new();
    let data = FailingStorage::new(Arc::new(MemoryStorage::new(1 << 20)));
    parts.data = DataFile::new(Arc::clone(&parts.metadata), true);
    parts.data.attach(Arc::clone(&data) as _, false);
    // Nothing of that is known to be on disk, and nothing has changed since the image was opened.
    let calls = || (parts.storage.calls(), data.calls());
    for expected in [(1, 1), (0, 1)] {
        let before = calls();
        parts.flusher().flush().unwrap();
        assert_eq!((calls().0 - before.0, calls().1 - before.1), expected);
    }
}

#[test]
fn a_freed_cluster_stays_counted_on_disk_until_its_entry_is_gone_there() {
    let parts = Parts::new();
    let host = parts.write_first_cluster();
    parts.flusher().flush().unwrap();
    let table = parts.mapping.table_for_write(GuestOffset::new(0), &Nothing).unwrap();
    let change = Change { guest: START, cluster: Cluster::default() };
    let cluster = parts.mapping.geometry().host_cluster(host);
    let freed = Freed { cluster, punch: false };
    parts.mapping.commit(&table, &[change], &[freed]).unwrap();
    assert!(parts.flusher().has_changes());
    parts.flusher().flush().unwrap();
    assert_eq!((parts.first_cluster(), parts.refcount(host)), (None, 1));
    assert!(parts.flusher().has_changes(), "the refcount is lowered in memory");
    parts.flusher().flush().unwrap();
    assert_eq!(parts.refcount(host), 0);
}

#[test]
fn a_refcount_table_that_moves_is_whole_before_the_header_names_it() {
    for call in 0.. {
        let parts = Parts::new();
        let place = parts.clusters.reserve_exact(2, &Nothing).unwrap();
        let place = TablePlace { offset: place.offset, clusters: place.clusters };
        parts.clusters.allocator().unwrap().new_table_place = Some(place);
        let begun = parts.storage.calls() + call;
        parts.storage.set_fault(Some(Fault { calls: begun..begun + 1, code: libc::ENOSPC }));
        let flushed = parts.flusher().flush();
        parts.storage.set_fault(None);
        let named = || parts.word(field::REFCOUNT_TABLE_OFFSET);
        assert!([CLUSTER, place.offset.bytes()].contains(&named()), "call {call}");
        assert_eq!(parts.word(named()), 2 * CLUSTER, "call {call}");
        if flushed.is_err() {
            parts.flusher().flush().unwrap();
        }
        assert_eq!(named(), place.offset.bytes(), "call {call}");
        assert_eq!(parts.metadata.header().refcount_table_offset, place.offset);
        if flushed.is_ok() {
            assert!(call > 4, "a flush has at least so many steps");
            break;
        }
    }
}
