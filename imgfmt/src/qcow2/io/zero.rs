//! Zeroes and discards: changes of the mapping without data.

use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind, ExtentList};
use crate::qcow2::alloc::allocator::Freed;
use crate::qcow2::image::Qcow2;
use crate::qcow2::io::erase::{Erase, EraseRules};
use crate::qcow2::map::lookup::{Lookup, span};
use crate::qcow2::map::tables::Change;
use crate::qcow2::on_disk::l2::{Cluster, Subcluster};
use crate::read::extents;
use crate::storage::{Speed, ZeroMode};
use crate::units::{GuestOffset, GuestRange, Offset as _};

/// Number of clusters that are erased together, at most those of one slice of an L2 table. Bounds
/// memory, and the time for which other writers wait.
const CLUSTERS_MAX: u64 = 8192;

/// The state of a part of a subcluster before it is zeroed.
#[derive(Clone, Copy, Debug)]
enum Edge {
    /// It reads as zero because of an entry in this layer.
    Zero,
    /// This layer has no content there, and the rest of the subcluster reads as zero.
    Nothing(Cluster),
    /// It can be made zero only by writing.
    Data,
}

impl Qcow2 {
    pub(in crate::qcow2) fn zero_range(
        &self,
        range: GuestRange,
        mode: ZeroMode,
        speed: Speed,
    ) -> Result<()> {
        self.flusher().relieve_pressure()?;
        let unit = self.geometry().subcluster_size();
        let (start, end) = (range.offset(), range.end());
        let inner = self.whole_subclusters(range);
        let maps_inner = self.erase_rules().can_map_zeroes() && !inner.is_empty();
        let edges = match maps_inner {
            true => [span(start, inner.offset()), span(inner.end().min(end), end)],
            false => [range, span(end, end)],
        };
        if speed == Speed::FastOnly {
            for part in edges.into_iter().flat_map(|edge| parts_of(edge, unit)) {
                if matches!(self.look_at_edge(part)?, Edge::Data) {
                    return Err(not_fast());
                }
            }
        }
        if maps_inner {
            self.erase(inner, Erase::Zero(mode))?;
        }
        edges.into_iter().try_for_each(|edge| self.zero_edge(edge))
    }

    /// The subclusters that are completely in a range. The end of the disk may be within one: bytes
    /// after it are not data.
    fn whole_subclusters(&self, range: GuestRange) -> GuestRange {
        let unit = self.geometry().subcluster_size();
        let end = match range.end().bytes() == self.size {
            true => range.end().round_up(unit),
            false => range.end().round_down(unit),
        };
        span(range.offset().round_up(unit), end)
    }

    pub(in crate::qcow2) fn discard_range(&self, range: GuestRange) -> Result<()> {
        self.flusher().relieve_pressure()?;
        // Without the zero flag a discarded cluster would show the backing file's content.
        if !self.erase_rules().can_map_zeroes() {
            return Ok(());
        }
        let inner = self.whole_subclusters(range);
        if inner.is_empty() { Ok(()) } else { self.erase(inner, Erase::Discard) }
    }

    /// Converts every zero cluster to a kind that version 2 has: unallocated, or zeroes as data
    /// where a backing file would show. There must be neither subclusters nor a data file.
    pub(crate) fn expand_zeroes(&self) -> Result<()> {
        if !self.names_backing() {
            let end = self.size.next_multiple_of(self.geometry().cluster_size());
            return self.erase(span(0, end), Erase::Forget);
        }
        let zeroes = vec![0; self.geometry().cluster_size() as usize];
        let mut position = GuestOffset::new(0);
        while position.bytes() < self.size {
            let mut list = ExtentList::new(EXTENTS_OF_ZEROES);
            extents(self, span(position, self.size), &mut list)?;
            for extent in list.into_vec() {
                let end = extent.range.end();
                let is_marked = extent.depth == 1 && extent.kind != ExtentKind::Data;
                while is_marked && position < end {
                    self.flusher().relieve_pressure()?;
                    let stop =
                        end.min(self.geometry().cluster_start(position) + zeroes.len() as u64);
                    let length = (stop - position) as usize;
                    self.write_range(position, &zeroes[..length])?;
                    position = stop;
                }
                position = end;
            }
        }
        Ok(())
    }

    /// The rules for zeroes in entries of this image.
    fn erase_rules(&self) -> EraseRules {
        EraseRules { format: self.mapping.format, names_backing: self.names_backing() }
    }

    /// Zeroes a range that contains no complete subcluster, or any range if no entry can mean
    /// "zero".
    fn zero_edge(&self, edge: GuestRange) -> Result<()> {
        let unit = self.geometry().subcluster_size();
        let zeroes = vec![0; edge.length().min(unit) as usize];
        for part in parts_of(edge, unit) {
            if !self.mark_edge(part)? {
                self.flusher().relieve_pressure()?;
                self.write_range(part.offset(), &zeroes[..part.length() as usize])?;
            }
        }
        Ok(())
    }

    /// Makes a part of a subcluster zero if that needs no data; returns whether it did.
    fn mark_edge(&self, part: GuestRange) -> Result<bool> {
        let geometry = self.geometry();
        // Keeps other writers out of the subcluster between the examination and the change.
        let first = geometry.guest_cluster(part.offset());
        let _stripes = self.clusters.lock(first, 1, Lookup::MayRead);
        match self.look_at_edge(part)? {
            Edge::Zero => Ok(true),
            Edge::Data => Ok(false),
            Edge::Nothing(old) => {
                let guest = geometry.cluster_start(part.offset());
                let mask = geometry.subcluster_mask(part.offset() - guest, part.end() - guest);
                let table = self.mapping.table_for_write(guest, self)?;
                self.mapping.refuse_bad(&table, guest)?;
                let cluster = Cluster { zero: old.zero | mask, ..old };
                self.mapping.commit(&table, &[Change { guest, cluster }], &[])?;
                Ok(true)
            }
        }
    }

    /// Finds the state of a part of a subcluster from mappings alone.
    fn look_at_edge(&self, part: GuestRange) -> Result<Edge> {
        let zero_or_data = |is_zero| if is_zero { Edge::Zero } else { Edge::Data };
        if !self.erase_rules().marks_zeroes() {
            return self.is_zero_here(part).map(zero_or_data);
        }
        let geometry = self.geometry();
        let unit = geometry.subcluster_size();
        let start = part.offset();
        let old = match self.mapping.table(start, Lookup::MayRead)? {
            Some(Some(table)) => self.mapping.decode(&table, start),
            _ => Ok(Cluster::default()),
        };
        let old = old.map_err(|error| self.metadata.note_damage(error))?;
        let subcluster = geometry.in_cluster(start) / unit;
        match old.content(geometry, subcluster as u32) {
            Subcluster::Zero => Ok(Edge::Zero),
            Subcluster::Compressed(_) => Ok(Edge::Data),
            Subcluster::Stored(_) => self.is_zero_here(part).map(zero_or_data),
            Subcluster::Unallocated => {
                // The part to be zeroed may have any content, if the rest of the subcluster is
                // zero.
                let whole = start.round_down(unit);
                let is_zero = self.is_zero_below(span(whole, start))?
                    && self.is_zero_below(span(part.end(), whole + unit))?;
                Ok(if is_zero { Edge::Nothing(old) } else { Edge::Data })
            }
        }
    }

    /// Whether the layers below read as zero there.
    fn is_zero_below(&self, range: GuestRange) -> Result<bool> {
        self.backing.with(|backing| {
            let Some(backing) = backing else { return Ok(true) };
            let inside = range.intersection(span(0, backing.size));
            if inside.is_empty() {
                return Ok(true);
            }
            let mut list = ExtentList::new(EXTENTS_OF_ZEROES);
            extents(&*backing.layer, inside, &mut list)?;
            Ok(is_zero_until(&list.into_vec(), inside.end()))
        })
    }

    /// Whether a range reads as zero already, regardless of the layers below this one.
    fn is_zero_here(&self, range: GuestRange) -> Result<bool> {
        let mut list = ExtentList::new(EXTENTS_OF_ZEROES);
        extents(self, range, &mut list)?;
        let found = list.into_vec();
        // For the second condition see [`EraseRules::marks_zeroes`].
        let is_here = |extent: &Extent| extent.depth == 1 || !self.names_backing();
        Ok(is_zero_until(&found, range.end()) && found.iter().all(is_here))
    }

    /// Erases a range of complete subclusters, one slice of the tables at a time.
    fn erase(&self, range: GuestRange, what: Erase) -> Result<()> {
        let geometry = self.geometry();
        // Both are powers of two, so each step is within one slice of a table.
        let step = self.mapping.slices.coverage().min(CLUSTERS_MAX << geometry.cluster_bits);
        for part in parts_of(range, step) {
            self.flusher().relieve_pressure()?;
            let left_over = self.erase_in_table(part, what)?;
            if matches!(what, Erase::Zero(_)) {
                left_over.into_iter().try_for_each(|edge| self.zero_edge(edge))?;
            }
        }
        Ok(())
    }

    /// Returns the parts that the mapping alone cannot erase: a part of a compressed cluster.
    fn erase_in_table(&self, range: GuestRange, what: Erase) -> Result<Vec<GuestRange>> {
        let geometry = self.geometry();
        let (first, count) = geometry.guest_clusters(range);
        let _stripes = self.clusters.lock(first, count, Lookup::MayRead);
        let rules = self.erase_rules();
        let may_stay_empty = rules.may_stay_empty(what);
        if may_stay_empty
            && matches!(self.mapping.table(range.offset(), Lookup::MayRead)?, Some(None))
        {
            return Ok(Vec::new());
        }
        let table = self.mapping.table_for_write(range.offset(), self)?;
        let (mut changes, mut freed): (Vec<Change>, Vec<Freed>) = (Vec::new(), Vec::new());
        let mut left_over = Vec::new();
        for part in parts_of(range, geometry.cluster_size()) {
            let position = part.offset();
            let guest_start = geometry.cluster_start(position);
            self.mapping.refuse_bad(&table, position)?;
            let old = self.mapping.decode_to_change(&table, position)?;
            let mask = geometry.subcluster_mask(position - guest_start, part.end() - guest_start);
            if old.compressed.is_some() && mask != geometry.all_subclusters() {
                left_over.push(part);
            } else if let Some(new) = rules.erased(old, mask, what) {
                let punch = what != Erase::Zero(ZeroMode::KeepAllocated);
                freed.extend(self.mapping.references(old, new.host, punch));
                changes.push(Change { guest: guest_start, cluster: new });
            }
        }
        if !changes.is_empty() {
            self.mapping.commit(&table, &changes, &freed)?;
            self.data.erase(range)?;
        }
        Ok(left_over)
    }
}

/// Parts of a range that are examined one by one: they end at multiples of `unit` bytes.
fn parts_of(range: GuestRange, unit: u64) -> impl Iterator<Item = GuestRange> {
    let end = range.end();
    let stop = move |start: GuestOffset| end.min(start.round_down(unit).saturating_add(unit));
    std::iter::successors(Some(range.offset()), move |start| Some(stop(*start)))
        .take_while(move |start| *start < end)
        .map(move |start| span(start, stop(start)))
}

/// Number of extents that are examined to find out whether a range reads as zero.
const EXTENTS_OF_ZEROES: usize = 64;

/// Whether extents reach `end` and none of them has data.
fn is_zero_until(extents: &[Extent], end: GuestOffset) -> bool {
    extents.last().is_some_and(|last| last.range.end() >= end)
        && extents.iter().all(|extent| extent.kind != ExtentKind::Data)
}

fn not_fast() -> Error {
    let detail = "parts of the range can only be zeroed by writing; allow the slow way, or align \
                  the range to clusters";
    Error::new(ErrorKind::NotFast, "write zeroes to", detail)
}
