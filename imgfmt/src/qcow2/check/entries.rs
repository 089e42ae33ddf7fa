//! L2 entries: finding damage, and counting references.

use std::mem;
use std::ops::Range;

use super::checker::{Checker, Fix};
use crate::qcow2::on_disk::l2::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};
use crate::units::{HostOffset, Offset as _};

/// Reserved bits of an entry that is not compressed.
const RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// An L2 entry and its location.
struct Word {
    word: u64,
    bitmap: u64,
    place: HostOffset,
    weight: u64,
}

/// The state of counting the entries of one table.
#[derive(Default)]
struct Progress {
    is_active: bool,
    /// The offset of the next data cluster, if there is no fragmentation.
    expected_next: Option<HostOffset>,
    /// Data clusters that follow each other, which are counted at once.
    run: Range<HostOffset>,
}

impl Checker<'_> {
    /// Counts the references of the entries of the L2 table at `table`, `weight` times.
    pub(super) fn count_table(
        &mut self,
        words: &[u64],
        table: HostOffset,
        weight: u64,
        is_active: bool,
    ) {
        let entry_words = self.image.geometry().entry_words();
        let mut progress = Progress { is_active, ..Progress::default() };
        for (index, entry) in words.chunks_exact(entry_words).enumerate() {
            let (word, bitmap) = (entry[0], entry.get(1).copied().unwrap_or(0));
            if word == 0 && bitmap == 0 || self.passes_over(word) {
                continue;
            }
            let place = table + (index * entry_words) as u64 * 8;
            let word = Word { word, bitmap, place, weight };
            match word.word & COMPRESSED {
                0 => self.count_standard(&word, &mut progress),
                _ => self.count_compressed(&word, is_active),
            }
        }
        self.add_run(progress.run, weight);
    }

    /// Whether only the references to some clusters are counted, and this entry leads to others.
    fn passes_over(&self, word: u64) -> bool {
        let Some(watched) = &self.watched else { return false };
        let geometry = self.image.geometry();
        let (start, length) = match word & COMPRESSED {
            0 => (HostOffset::new(word & OFFSET_MASK), geometry.cluster_size()),
            _ => {
                let place = self.image.mapping.format.compressed_place(word);
                (place.offset, place.length)
            }
        };
        let last = start.saturating_add(length.saturating_sub(1));
        !watched.touches(geometry.host_cluster(start), geometry.host_cluster(last))
    }

    fn count_compressed(&mut self, entry: &Word, is_active: bool) {
        let word = entry.word;
        if word & COPIED != 0 {
            self.damage(format!("a compressed cluster has the COPIED bit ({word:#x})"));
        }
        if self.image.mapping.format.has_data_file {
            return self.damage(format!(
                "an L2 entry is compressed although there is a data file ({word:#x})"
            ));
        }
        if entry.bitmap != 0 {
            self.damage(format!("a compressed cluster has a bitmap of subclusters ({word:#x})"));
        }
        let place = self.image.mapping.format.compressed_place(word);
        if place.offset.bytes() >> 56 != 0 {
            return self.damage(format!("a compressed cluster is out of bounds ({word:#x})"));
        }
        self.add(place.offset, place.length, entry.weight, "a compressed cluster");
        self.report.allocated_clusters += u64::from(is_active);
        self.report.compressed_clusters += u64::from(is_active);
        // By their nature: they do not lie cluster by cluster.
        self.report.fragmented_clusters += u64::from(is_active);
    }

    fn count_standard(&mut self, entry: &Word, progress: &mut Progress) {
        let image = self.image;
        let geometry = image.geometry();
        let (word, bitmap) = (entry.word, entry.bitmap);
        if word & RESERVED != 0 {
            self.damage(format!("an L2 entry has reserved bits set ({word:#x})"));
        }
        let (data, zero) = (bitmap as u32, (bitmap >> 32) as u32);
        let is_zero = !geometry.extended_l2 && word & ZERO != 0;
        if is_zero && image.mapping.format.version < 3 {
            self.damage(format!(
                "an L2 entry has the zero flag, which version 2 lacks ({word:#x})"
            ));
        }
        let host = HostOffset::new(word & OFFSET_MASK);
        let has_host = host.bytes() != 0
            || (image.mapping.format.has_data_file && word & COPIED != 0 && !is_zero);
        if !has_host {
            if data != 0 {
                self.damage(format!(
                    "an L2 entry has data in subclusters but no cluster ({bitmap:#x})"
                ));
            }
            return;
        }
        if data & zero != 0 {
            self.damage(format!(
                "an L2 entry has a subcluster that is both data and zero ({bitmap:#x})"
            ));
        }
        if geometry.in_cluster(host) != 0 {
            let message = format!("an L2 entry points into the middle of a cluster ({word:#x})");
            let holds_data = if geometry.extended_l2 { data != 0 } else { !is_zero };
            match holds_data {
                true => self.damage(message),
                // The file ends before it: the cluster reads as zero without it.
                false => {
                    let new = word & !(OFFSET_MASK | COPIED);
                    return self.fix(Fix { place: entry.place, new, sets_copied: false }, message);
                }
            }
        }
        if progress.is_active {
            self.report.allocated_clusters += 1;
            let is_fragmented = progress.expected_next.is_some_and(|expected| expected != host);
            self.report.fragmented_clusters += u64::from(is_fragmented);
            progress.expected_next = Some(host + geometry.cluster_size());
        }
        if image.mapping.format.has_data_file {
            return;
        }
        if geometry.in_cluster(host) != 0 {
            self.add(host, geometry.cluster_size(), entry.weight, "a data cluster");
            return;
        }
        let run = &mut progress.run;
        if run.end != host || run.is_empty() {
            let full = mem::replace(run, host..host);
            run.end += geometry.cluster_size();
            return self.add_run(full, entry.weight);
        }
        run.end += geometry.cluster_size();
    }

    /// Counts data clusters that follow each other.
    fn add_run(&mut self, run: Range<HostOffset>, weight: u64) {
        let geometry = self.image.geometry();
        if run.is_empty() {
            return;
        }
        let (first, end) = (geometry.host_cluster(run.start), geometry.host_cluster(run.end));
        if end <= self.file_end {
            let last = geometry.host_cluster(HostOffset::new(run.end.bytes() - 1));
            return self.counts.add(first, last, weight);
        }
        // Report each invalid cluster.
        for host in first.up_to(end).map(|cluster| geometry.host_offset(cluster)) {
            self.add(host, geometry.cluster_size(), weight, "a data cluster");
        }
    }
}
