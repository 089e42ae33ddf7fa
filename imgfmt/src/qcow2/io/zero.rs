//! Zeroes and discards: changes of the mapping that move no data.

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
use crate::units::{GuestOffset, GuestRange};

/// So many clusters are looked at together, at most those of one L2 table: bounds memory, and how
/// long others wait for these clusters.
const CLUSTERS_MAX: u64 = 8192;

/// What a part of a subcluster is before it is zeroed.
#[derive(Clone, Copy, Debug)]
enum Edge {
    /// It reads as zero, and this layer says so.
    Zero,
    /// This layer has nothing there, and the rest of the subcluster reads as zero.
    Nothing(Cluster),
    /// Only by writing it can be made zero.
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
        let (start, end) = (range.offset().bytes(), range.end().bytes());
        // The end of the disk may lie within a cluster: what is behind it is nobody's.
        let inner_end =
            if end == self.size { end.next_multiple_of(unit) } else { end / unit * unit };
        let inner_start = start.next_multiple_of(unit);
        let can_map = self.erase_rules().can_map_zeroes();
        let edges = match can_map && inner_start < inner_end {
            true => [(start, inner_start), (inner_end.min(end), end)],
            false => [(start, end), (end, end)],
        };
        if speed == Speed::FastOnly {
            for (start, end) in edges {
                for (start, end) in edge_parts(unit, start, end) {
                    if matches!(self.look_at_edge(start, end)?, Edge::Data) {
                        return Err(not_fast());
                    }
                }
            }
        }
        if can_map && inner_start < inner_end {
            self.erase(inner_start, inner_end, Erase::Zero(mode))?;
        }
        for (start, end) in edges {
            self.zero_edge(start, end)?;
        }
        Ok(())
    }

    pub(in crate::qcow2) fn discard_range(&self, range: GuestRange) -> Result<()> {
        self.flusher().relieve_pressure()?;
        // Without the zero flag a discarded cluster would show the backing file's content.
        if !self.erase_rules().can_map_zeroes() {
            return Ok(());
        }
        let unit = self.geometry().subcluster_size();
        let (start, end) = (range.offset().bytes(), range.end().bytes());
        let end = if end == self.size { end.next_multiple_of(unit) } else { end / unit * unit };
        let start = start.next_multiple_of(unit);
        if start < end { self.erase(start, end, Erase::Discard) } else { Ok(()) }
    }

    /// Makes every cluster that says "zero" one that version 2 can have: one with nothing, or one with zeroes
    /// as data where a backing file would show. There must be neither subclusters nor a data file.
    pub(crate) fn expand_zeroes(&self) -> Result<()> {
        if !self.names_backing() {
            let end = self.size.next_multiple_of(self.geometry().cluster_size());
            return self.erase(0, end, Erase::Forget);
        }
        let zeroes = vec![0; self.geometry().cluster_size() as usize];
        let mut position = 0;
        while position < self.size {
            let mut list = ExtentList::new(EXTENTS_OF_ZEROES);
            extents(self, span(position, self.size), &mut list)?;
            for extent in list.into_vec() {
                let end = extent.range.end().bytes();
                let is_marked = extent.depth == 1 && extent.kind != ExtentKind::Data;
                while is_marked && position < end {
                    self.flusher().relieve_pressure()?;
                    let stop =
                        end.min(self.geometry().cluster_start(position) + zeroes.len() as u64);
                    let length = (stop - position) as usize;
                    self.write_range(GuestOffset::new(position), &zeroes[..length])?;
                    position = stop;
                }
                position = end;
            }
        }
        Ok(())
    }

    /// What entries of this image can say about zeroes.
    fn erase_rules(&self) -> EraseRules {
        EraseRules { format: self.mapping.format, names_backing: self.names_backing() }
    }

    /// Zeroes a range in which no subcluster lies wholly, or any range if no entry can say "zero".
    fn zero_edge(&self, start: u64, end: u64) -> Result<()> {
        let unit = self.geometry().subcluster_size();
        let zeroes = vec![0; (end - start).min(unit) as usize];
        for (start, end) in edge_parts(unit, start, end) {
            if !self.mark_edge(start, end)? {
                self.flusher().relieve_pressure()?;
                self.write_range(GuestOffset::new(start), &zeroes[..(end - start) as usize])?;
            }
        }
        Ok(())
    }

    /// Makes a part of a subcluster zero if that takes no data; returns whether it is.
    fn mark_edge(&self, start: u64, end: u64) -> Result<bool> {
        let geometry = self.geometry();
        // Nobody writes to another part of the subcluster from the look to the mark.
        let first = start >> geometry.cluster_bits;
        let _stripes = self.clusters.lock(first, 1, Lookup::MayRead);
        match self.look_at_edge(start, end)? {
            Edge::Zero => Ok(true),
            Edge::Data => Ok(false),
            Edge::Nothing(old) => {
                let guest = geometry.cluster_start(start);
                let mask = geometry.subcluster_mask(start - guest, end - guest);
                let table = self.mapping.table_for_write(geometry.l1_index(guest), self)?;
                self.mapping.refuse_bad(&table, guest)?;
                let cluster = Cluster { zero: old.zero | mask, ..old };
                self.mapping.commit(&table, &[Change { guest, cluster }], &[])?;
                Ok(true)
            }
        }
    }

    /// What a part of a subcluster holds, as far as mappings tell.
    fn look_at_edge(&self, start: u64, end: u64) -> Result<Edge> {
        let zero_or_data = |is_zero| if is_zero { Edge::Zero } else { Edge::Data };
        if !self.erase_rules().marks_zeroes() {
            return self.is_zero_here(start, end).map(zero_or_data);
        }
        let geometry = self.geometry();
        let unit = geometry.subcluster_size();
        let old = match self.mapping.table(geometry.l1_index(start), Lookup::MayRead)? {
            Some(Some(table)) => self.mapping.decode(&table, start),
            _ => Ok(Cluster::default()),
        };
        let old = old.map_err(|error| self.metadata.note_damage(error))?;
        let subcluster = geometry.in_cluster(start) / unit;
        match old.content(geometry, subcluster as u32) {
            Subcluster::Zero => Ok(Edge::Zero),
            Subcluster::Compressed(_) => Ok(Edge::Data),
            Subcluster::Stored(_) => self.is_zero_here(start, end).map(zero_or_data),
            Subcluster::Unallocated => {
                // What is zeroed may be anything now, if the rest of the subcluster is zero.
                let (whole, whole_end) = (start / unit * unit, (start / unit + 1) * unit);
                let is_zero =
                    self.is_zero_below(whole, start)? && self.is_zero_below(end, whole_end)?;
                Ok(if is_zero { Edge::Nothing(old) } else { Edge::Data })
            }
        }
    }

    /// Whether the layers below read as zero there.
    fn is_zero_below(&self, start: u64, end: u64) -> Result<bool> {
        let Some(backing) = &self.backing else { return Ok(true) };
        let inside = span(start.min(backing.size), end.min(backing.size));
        if inside.is_empty() {
            return Ok(true);
        }
        let mut list = ExtentList::new(EXTENTS_OF_ZEROES);
        extents(&*backing.layer, inside, &mut list)?;
        Ok(is_zero_until(&list.into_vec(), inside.end().bytes()))
    }

    /// Whether a range reads as zero already, and will whatever lies below this layer.
    fn is_zero_here(&self, start: u64, end: u64) -> Result<bool> {
        let mut list = ExtentList::new(EXTENTS_OF_ZEROES);
        extents(self, span(start, end), &mut list)?;
        let found = list.into_vec();
        // See [`EraseRules::marks_zeroes`] about the second.
        let is_here = |extent: &Extent| extent.depth == 1 || !self.names_backing();
        Ok(is_zero_until(&found, end) && found.iter().all(is_here))
    }

    /// Erases a range of whole subclusters, table by table.
    fn erase(&self, start: u64, end: u64, what: Erase) -> Result<()> {
        let geometry = self.geometry();
        // Both are powers of two, so each step lies within one table.
        let step = geometry.l2_coverage().min(CLUSTERS_MAX << geometry.cluster_bits);
        let mut position = start;
        while position < end {
            let stop = end.min((position / step + 1).saturating_mul(step));
            self.flusher().relieve_pressure()?;
            let left_over = self.erase_in_table(position, stop, what)?;
            if matches!(what, Erase::Zero(_)) {
                for (start, end) in left_over {
                    self.zero_edge(start, end)?;
                }
            }
            position = stop;
        }
        Ok(())
    }

    /// Returns the parts that the mapping alone cannot erase: a part of a compressed cluster.
    fn erase_in_table(&self, start: u64, end: u64, what: Erase) -> Result<Vec<(u64, u64)>> {
        let geometry = self.geometry();
        let l1_index = geometry.l1_index(start);
        let first = start >> geometry.cluster_bits;
        let count = ((end - 1) >> geometry.cluster_bits) - first + 1;
        let _stripes = self.clusters.lock(first, count, Lookup::MayRead);
        let rules = self.erase_rules();
        let may_stay_empty = rules.may_stay_empty(what);
        if may_stay_empty && matches!(self.mapping.table(l1_index, Lookup::MayRead)?, Some(None)) {
            return Ok(Vec::new());
        }
        let table = self.mapping.table_for_write(l1_index, self)?;
        let (mut changes, mut freed): (Vec<Change>, Vec<Freed>) = (Vec::new(), Vec::new());
        let mut left_over = Vec::new();
        let mut position = start;
        while position < end {
            let guest_start = geometry.cluster_start(position);
            let stop = end.min(guest_start + geometry.cluster_size());
            self.mapping.refuse_bad(&table, position)?;
            let old = self.mapping.decode_to_change(&table, position)?;
            let mask = geometry.subcluster_mask(position - guest_start, stop - guest_start);
            if old.compressed.is_some() && mask != geometry.all_subclusters() {
                left_over.push((position, stop));
            } else if let Some(new) = rules.erased(old, mask, what) {
                let punch = what != Erase::Zero(ZeroMode::KeepAllocated);
                freed.extend(self.mapping.references(old, new.host, punch));
                changes.push(Change { guest: guest_start, cluster: new });
            }
            position = stop;
        }
        if !changes.is_empty() {
            self.mapping.commit(&table, &changes, &freed)?;
            self.data.erase(span(start, end))?;
        }
        Ok(left_over)
    }
}

/// Parts of a range that are looked at one by one: they end where subclusters, of `unit` bytes,
/// do.
fn edge_parts(unit: u64, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
    let stop = move |position: u64| end.min((position / unit + 1).saturating_mul(unit));
    std::iter::successors(Some(start), move |position| Some(stop(*position)))
        .take_while(move |position| *position < end)
        .map(move |position| (position, stop(position)))
}

/// So many extents are looked at to find out whether a range reads as zero.
const EXTENTS_OF_ZEROES: usize = 64;

/// Whether extents reach `end` and none of them has data.
fn is_zero_until(extents: &[Extent], end: u64) -> bool {
    extents.last().is_some_and(|last| last.range.end().bytes() >= end)
        && extents.iter().all(|extent| extent.kind != ExtentKind::Data)
}

fn not_fast() -> Error {
    let detail = "parts of the range can only be zeroed by writing; allow the slow way, or align \
                  the range to clusters";
    Error::new(ErrorKind::NotFast, "write zeroes to", detail)
}
