//! Gives the image content of its own where the layers below show, without changing the disk.
//!
//! The content of the layers below never changes, so it is read before any lock is held. Then, with
//! the stripes of the clusters locked, only what still has no content is filled: whatever a writer
//! has put there meanwhile stays.

use crate::error::Result;
use crate::qcow2::image::Qcow2;
use crate::qcow2::io::write::{part_of, step_bytes};
use crate::qcow2::map::lookup::Lookup;
use crate::qcow2::map::tables::Change;
use crate::qcow2::on_disk::l2::{Cluster, Subcluster};
use crate::units::{GuestOffset, GuestRange, Offset as _, span};
use crate::zero::is_zero;

/// Number of clusters that are marked as zero together: bounds the time for which writers wait.
const ZEROES_MAX: u64 = 8192;

/// What the layers below have in a range.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Below<'a> {
    /// These bytes.
    Data(&'a [u8]),
    Zeroes,
}

/// What became content of the image, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Populated {
    pub(crate) data: u64,
    pub(crate) zeroes: u64,
}

impl Qcow2 {
    /// Fills the subclusters of a range that have no content with what the layers below have there.
    /// The range begins and ends where subclusters do, or ends with the disk. Bitmaps record
    /// nothing, because the disk does not change.
    ///
    /// Version 2 has no entry for zeroes that hide a backing file. With `keeps_zeroes` they are
    /// written as data there; otherwise they are left to the layers below.
    pub(crate) fn populate(
        &self,
        range: GuestRange,
        below: Below<'_>,
        keeps_zeroes: bool,
    ) -> Result<Populated> {
        self.metadata.refuse_if_corrupt()?;
        self.metadata.break_seal()?;
        // Version 2 may have to write zeroes.
        let step = match below {
            Below::Zeroes if self.mapping.format.version >= 3 => {
                self.mapping.slices.coverage().min(ZEROES_MAX << self.geometry().cluster_bits)
            }
            _ => step_bytes(&self.mapping),
        };
        let mut populated = Populated::default();
        let mut position = range.offset();
        while position < range.end() {
            self.flusher().relieve_pressure()?;
            // Steps end at multiples of their size, so each is within one slice of an L2 table.
            let length = step - position.bytes() % step;
            let part = span(position, range.end().min(position.saturating_add(length)));
            let below = match below {
                Below::Data(data) => Below::Data(part_of(data, range.offset(), part)),
                Below::Zeroes => Below::Zeroes,
            };
            self.populate_step(part, below, keeps_zeroes, &mut populated)?;
            position = part.end();
        }
        Ok(populated)
    }

    fn populate_step(
        &self,
        range: GuestRange,
        below: Below<'_>,
        keeps_zeroes: bool,
        populated: &mut Populated,
    ) -> Result<()> {
        let (first, count) = self.geometry().guest_clusters(range);
        let _stripes = self.clusters.lock(first, count, Lookup::MayRead);
        let unit = self.geometry().subcluster_size();
        for hole in self.without_content(range)? {
            // Neighbours of the same kind are filled together.
            let mut begun = span(hole.offset(), hole.offset());
            let mut has_data = false;
            while begun.end() < hole.end() {
                let start = begun.end();
                let piece =
                    span(start, hole.end().min(start.round_down(unit).saturating_add(unit)));
                let is_data = match below {
                    Below::Data(data) => !is_zero(part_of(data, range.offset(), piece)),
                    Below::Zeroes => false,
                };
                if !begun.is_empty() && is_data != has_data {
                    self.fill(range.offset(), begun, (below, has_data), keeps_zeroes, populated)?;
                    begun = span(start, start);
                }
                has_data = is_data;
                begun = span(begun.offset(), piece.end());
            }
            self.fill(range.offset(), begun, (below, has_data), keeps_zeroes, populated)?;
        }
        Ok(())
    }

    /// Fills a piece with its data below, which begin at `start`, or with zeroes.
    fn fill(
        &self,
        start: GuestOffset,
        piece: GuestRange,
        (below, has_data): (Below<'_>, bool),
        keeps_zeroes: bool,
        populated: &mut Populated,
    ) -> Result<()> {
        // The file's time of modification changes, and no bit of a bitmap does.
        self.metadata.note_alive();
        match below {
            Below::Data(data) if has_data => {
                self.write_locked(piece.offset(), part_of(data, start, piece), Lookup::MayRead)?;
                populated.data += piece.length();
                return Ok(());
            }
            _ if self.mapping.format.version >= 3 => self.mark_zeroes(piece)?,
            _ if keeps_zeroes => {
                let zeroes = vec![0; piece.length() as usize];
                self.write_locked(piece.offset(), &zeroes, Lookup::MayRead)?;
            }
            _ => return Ok(()),
        }
        populated.zeroes += piece.length();
        Ok(())
    }

    /// Gives subclusters without content, in one slice of a table, entries that read as zero.
    fn mark_zeroes(&self, range: GuestRange) -> Result<()> {
        let geometry = self.geometry();
        let table = self.mapping.table_for_write(range.offset(), self)?;
        let mut changes = Vec::new();
        let mut position = range.offset();
        while position < range.end() {
            let guest = geometry.cluster_start(position);
            let end = range.end().min(guest + geometry.cluster_size());
            self.mapping.refuse_bad(&table, guest)?;
            let old = self.mapping.decode_to_change(&table, guest)?;
            let mask = geometry.subcluster_mask(position - guest, end - guest);
            changes.push(Change { guest, cluster: Cluster { zero: old.zero | mask, ..old } });
            position = end;
        }
        self.mapping.commit(&table, &changes, &[])
    }

    /// The parts of a range, within one slice of a table, that have no content in this image.
    fn without_content(&self, range: GuestRange) -> Result<Vec<GuestRange>> {
        let mut found = Vec::new();
        let mut position = range.offset();
        while position < range.end() {
            let piece = self.mapping.piece(position, range.end(), Lookup::MayRead)?;
            let Some(piece) = piece else { break };
            if piece.content == Subcluster::Unallocated {
                found.push(piece.range);
            }
            position = piece.range.end();
        }
        Ok(found)
    }
}
