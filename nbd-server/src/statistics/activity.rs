//! Counts requests by regions of a disk.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::cell::add;
use super::requests::RequestKind;

/// Maximum number of regions of a disk.
const MAX_REGIONS: u64 = 256;

/// The bytes read and changed in each region of a disk, since the export was added.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Activity {
    /// Length of a region, in bytes: a power of two. The last one may be shorter.
    pub region_length: u64,
    /// For each region, the bytes of READ requests.
    pub read: Vec<u64>,
    /// For each region, the bytes of WRITE, TRIM and WRITE_ZEROES requests.
    pub written: Vec<u64>,
}

impl Activity {
    pub(super) fn new(size: u64) -> Self {
        let shift = shift_of(size);
        let count = regions(size, shift);
        Self { region_length: 1 << shift, read: vec![0; count], written: vec![0; count] }
    }

    /// Adds the activity of another connection, which may have seen a disk of another size.
    pub(super) fn add(&mut self, other: &Self) {
        if other.region_length > self.region_length {
            let smaller = std::mem::replace(self, other.clone());
            return self.add(&smaller);
        }
        let step = (self.region_length / other.region_length.max(1)).max(1);
        let parts = [(&mut self.read, &other.read), (&mut self.written, &other.written)];
        for (sums, values) in parts {
            let needed = values.len().div_ceil(usize::try_from(step).unwrap_or(usize::MAX));
            sums.resize(sums.len().max(needed), 0);
            for (index, value) in (0_u64..).zip(values) {
                if let Some(sum) = sums.get_mut((index / step) as usize) {
                    *sum = sum.wrapping_add(*value);
                }
            }
        }
    }
}

/// The length of a region, as a power of two.
const fn shift_of(size: u64) -> u32 {
    let least = size.div_ceil(MAX_REGIONS);
    // A region is at least a page.
    let length = if least < 4096 { 4096 } else { least };
    // Sizes are below 2^63, a region is below 2^56.
    u64::BITS - (length - 1).leading_zeros()
}

fn regions(size: u64, shift: u32) -> usize {
    usize::try_from(size.div_ceil(1 << shift)).unwrap_or(0)
}

/// The activity of one connection.
#[derive(Debug)]
pub(super) struct LiveActivity {
    shift: u32,
    /// Number of regions.
    count: usize,
    /// Made for the first request: many clients only read, and idle ones do not even that.
    read: OnceLock<Box<[AtomicU64]>>,
    written: OnceLock<Box<[AtomicU64]>>,
}

impl LiveActivity {
    pub(super) fn new(size: u64) -> Self {
        let shift = shift_of(size);
        let (read, written) = Default::default();
        Self { shift, count: regions(size, shift), read, written }
    }

    /// Records a request of a range inside the disk, in bytes. Called by one thread at a time.
    pub(super) fn note(&self, kind: RequestKind, offset: u64, length: u64) {
        let regions = match kind {
            RequestKind::Read => &self.read,
            kind if kind.is_change() => &self.written,
            _ => return,
        };
        let zeroes = || (0..self.count).map(|_| AtomicU64::new(0)).collect();
        let regions = regions.get_or_init(zeroes);
        let end = offset.saturating_add(length);
        let mut at = offset;
        while at < end {
            let index = at >> self.shift;
            let region_end = ((index + 1) << self.shift).min(end);
            let Some(region) = regions.get(index as usize) else { return };
            add(region, region_end - at);
            at = region_end;
        }
    }

    pub(super) fn snapshot(&self) -> Activity {
        let load = |regions: &OnceLock<Box<[AtomicU64]>>| match regions.get() {
            Some(regions) => regions.iter().map(|it| it.load(Ordering::Relaxed)).collect(),
            None => vec![0; self.count],
        };
        let (read, written) = (load(&self.read), load(&self.written));
        Activity { region_length: 1 << self.shift, read, written }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_counts_in_every_region_it_touches() {
        let live = LiveActivity::new(1 << 20);
        live.note(RequestKind::Read, 4096 - 512, 1024);
        live.note(RequestKind::Trim, 8192, (1 << 20) - 8192);
        live.note(RequestKind::Flush, 0, 4096);
        let activity = live.snapshot();
        assert_eq!((activity.region_length, activity.read.len()), (4096, 256));
        assert_eq!(activity.read[..3], [512, 512, 0]);
        assert_eq!(activity.written[..3], [0, 0, 4096]);
        assert_eq!(activity.written.iter().sum::<u64>(), (1 << 20) - 8192);
    }

    #[test]
    fn a_connection_that_only_reads_takes_no_memory_for_changes() {
        let live = LiveActivity::new(1 << 20);
        assert_eq!(live.snapshot(), Activity::new(1 << 20));
        live.note(RequestKind::Read, 0, 4096);
        assert!(live.read.get().is_some() && live.written.get().is_none());
        assert_eq!(live.snapshot().written, vec![0; 256]);
    }

    #[test]
    fn every_size_has_a_bounded_number_of_regions() {
        for size in [0, 1, 4096, 1 << 20, (1 << 20) + 1, 1 << 40, (1 << 63) - 1] {
            let live = LiveActivity::new(size);
            live.note(RequestKind::Write, 0, size);
            let activity = live.snapshot();
            assert!(activity.written.len() <= 256, "{size}");
            assert_eq!(activity.written.iter().sum::<u64>(), size);
        }
    }

    #[test]
    fn activity_of_a_disk_that_grew_is_added_up() {
        let (small, large) = (LiveActivity::new(1 << 20), LiveActivity::new(1 << 22));
        small.note(RequestKind::Read, 0, 1 << 20);
        large.note(RequestKind::Read, 1 << 20, 4096);
        for parts in [[&small, &large], [&large, &small]] {
            let mut sum = Activity::new(1 << 20);
            parts.iter().for_each(|part| sum.add(&part.snapshot()));
            assert_eq!(sum.region_length, 16384);
            assert_eq!(sum.read[..66], [&[16384; 64][..], &[4096, 0]].concat());
        }
    }
}
