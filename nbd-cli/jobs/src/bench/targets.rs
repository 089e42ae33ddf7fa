//! The choice of the next request.

use super::options::{BlockSize, Pattern, RequestKind, Workload};
use super::random::{Random, Zipf};

/// A request to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) kind: RequestKind,
    /// Offset in the disk, in bytes.
    pub(super) offset: u64,
    /// In bytes.
    pub(super) length: u32,
}

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Section {
    pub(super) offset: u64,
    pub(super) length: u64,
}

impl Section {
    /// The part `index` of `parts` equal ones, each a multiple of `unit`.
    pub(super) fn part(self, index: u64, parts: u64, unit: u64) -> Self {
        let units = self.length / unit.max(1) / parts.max(1);
        let length = units.saturating_mul(unit);
        Self { offset: self.offset.saturating_add(length.saturating_mul(index)), length }
    }
}

/// Chooses requests.
#[derive(Debug)]
pub(super) struct Targets {
    random: Random,
    section: Section,
    workload: Workload,
    is_sequential: bool,
    sizes: Vec<Size>,
    weights: u64,
    /// The offset of the next sequential request in the section.
    cursor: u64,
}

#[derive(Debug)]
struct Size {
    length: u32,
    weight: u64,
    positions: u64,
    zipf: Option<Zipf>,
}

impl Targets {
    /// Requests in `section`, which is at least as long as the largest of `sizes`.
    pub(super) fn new(
        section: Section,
        workload: Workload,
        pattern: Pattern,
        sizes: &[BlockSize],
        random: Random,
    ) -> Self {
        let sizes: Vec<_> = sizes
            .iter()
            .map(|size| {
                let positions = section.length / u64::from(size.length.max(1));
                let zipf = match pattern {
                    Pattern::Zipfian { theta } => Some(Zipf::new(positions, theta)),
                    _ => None,
                };
                Size { length: size.length, weight: u64::from(size.weight), positions, zipf }
            })
            .collect();
        let weights = sizes.iter().map(|size| size.weight).sum();
        let is_sequential = pattern == Pattern::Sequential;
        Self { random, section, workload, is_sequential, sizes, weights, cursor: 0 }
    }

    /// The next request.
    pub(super) fn next(&mut self) -> Target {
        let kind = match self.workload {
            Workload::Read => RequestKind::Read,
            Workload::Write => RequestKind::Write,
            Workload::Zeroes => RequestKind::Zeroes,
            Workload::Trim => RequestKind::Trim,
            Workload::Mixed { read_percent } => match self.random.below(100) {
                percent if percent < u64::from(read_percent) => RequestKind::Read,
                _ => RequestKind::Write,
            },
        };
        let Self { random, sizes, .. } = self;
        let mut choice = if sizes.len() > 1 { random.below(self.weights) } else { 0 };
        let mut chosen = None;
        for size in sizes.iter() {
            chosen = Some(size);
            match choice.checked_sub(size.weight) {
                Some(rest) => choice = rest,
                None => break,
            }
        }
        let (length, distance) = match chosen {
            Some(size) if self.is_sequential => {
                let length = u64::from(size.length);
                if self.cursor.saturating_add(length) > self.section.length {
                    self.cursor = 0;
                }
                let at = self.cursor;
                self.cursor += length;
                (size.length, at)
            }
            Some(size) => {
                let place = match &size.zipf {
                    Some(zipf) => zipf.sample(random),
                    None => random.below(size.positions),
                };
                (size.length, place.saturating_mul(u64::from(size.length)))
            }
            None => (0, 0),
        };
        Target { kind, offset: self.section.offset.saturating_add(distance), length }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECTION: Section = Section { offset: 1 << 20, length: 1 << 20 };

    fn targets(workload: Workload, pattern: Pattern, sizes: &[(u32, u32)]) -> Targets {
        let sizes: Vec<_> = sizes
            .iter()
            .map(|(length, weight)| BlockSize { length: *length, weight: *weight })
            .collect();
        Targets::new(SECTION, workload, pattern, &sizes, Random::new(1, 0))
    }

    #[test]
    fn requests_stay_in_their_section_and_are_aligned_to_their_size() {
        for pattern in [Pattern::Random, Pattern::Zipfian { theta: 0.99 }, Pattern::Sequential] {
            let mut targets = targets(Workload::Read, pattern, &[(4096, 3), (12288, 1)]);
            for _ in 0..10_000 {
                let Target { offset, length, .. } = targets.next();
                let end = offset + u64::from(length);
                assert!(offset >= SECTION.offset && end <= SECTION.offset + SECTION.length);
                let distance = offset - SECTION.offset;
                let is_aligned = distance.is_multiple_of(u64::from(length));
                assert!(
                    is_aligned || pattern == Pattern::Sequential,
                    "{pattern:?} {offset} {length}"
                );
            }
        }
    }

    #[test]
    fn sizes_and_kinds_come_in_their_proportions() {
        let mut targets = targets(
            Workload::Mixed { read_percent: 70 },
            Pattern::Random,
            &[(4096, 9), (65536, 1)],
        );
        let all: Vec<_> = (0..100_000).map(|_| targets.next()).collect();
        let reads = all.iter().filter(|it| it.kind == RequestKind::Read).count();
        let large = all.iter().filter(|it| it.length == 65536).count();
        assert!((69_000..71_000).contains(&reads), "{reads}");
        assert!((9_400..10_600).contains(&large), "{large}");
    }

    #[test]
    fn sequential_requests_follow_each_other_and_begin_again() {
        let mut targets = targets(Workload::Write, Pattern::Sequential, &[(1 << 18, 1)]);
        let offsets: Vec<_> = (0..5).map(|_| targets.next().offset - SECTION.offset).collect();
        assert_eq!(offsets, [0, 1 << 18, 2 << 18, 3 << 18, 0]);
    }

    #[test]
    fn sections_do_not_overlap_and_lie_in_the_range() {
        let range = Section { offset: 512, length: 1_000_000 };
        let parts: Vec<_> = (0..3).map(|index| range.part(index, 3, 4096)).collect();
        for (part, next) in parts.iter().zip(&parts[1..]) {
            assert_eq!(part.offset + part.length, next.offset);
        }
        assert!(parts[2].offset + parts[2].length <= 512 + 1_000_000);
        assert!(parts.iter().all(|part| part.length == 81 * 4096));
    }
}
