//! How often the layers of a chain are asked.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::*;
use crate::units::span;

const GRANULE: u64 = 64 << 10;
const SIZE: u64 = 64 * GRANULE;

/// A layer that has zeroes in some ranges.
#[derive(Debug)]
struct Sparse {
    zeroes: Vec<(u64, u64)>,
    size: u64,
    backing: Option<Backing>,
    looks: Arc<AtomicU64>,
}

impl Sparse {
    /// The end of what is alike from `position` on, and whether there are zeroes.
    fn part(&self, position: u64, end: u64) -> (u64, bool) {
        let inside = |(start, stop): &&(u64, u64)| (*start..*stop).contains(&position);
        match self.zeroes.iter().find(inside) {
            Some((_, stop)) => (end.min(*stop), true),
            None => {
                let next = self.zeroes.iter().map(|zeroes| zeroes.0).filter(|at| *at > position);
                (next.min().unwrap_or(end).min(end), false)
            }
        }
    }
}

impl Layer for Sparse {
    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, range: GuestRange, walk: &mut Walk<'_>) -> Result<Mapped> {
        self.looks.fetch_add(1, Relaxed);
        let (mut position, end) = (range.offset().bytes(), range.end().bytes());
        while position < end {
            let (stop, is_zero) = self.part(position, end);
            let mapped = match is_zero {
                true => walk.push(self, span(position, stop), Content::Zero)?,
                false => Backing::map(self.backing.as_ref(), self, span(position, stop), walk)?,
            };
            if mapped != Mapped::Complete {
                return Ok(mapped);
            }
            position = stop;
        }
        Ok(Mapped::Complete)
    }

    fn lacks(&self, range: GuestRange, _: Lookup) -> Result<Option<bool>> {
        self.looks.fetch_add(1, Relaxed);
        let end = range.end().bytes();
        Ok(Some(self.part(range.offset().bytes(), end) == (end, false)))
    }

    fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }
}

/// A chain from the top to the bottom, the parts and sizes of which are given, and its count of
/// looks.
fn chain(layers: &[(&[(u64, u64)], u64)]) -> (Arc<dyn Layer>, Arc<AtomicU64>) {
    let looks = Arc::new(AtomicU64::new(0));
    let mut chain: Option<Arc<dyn Layer>> = None;
    for (zeroes, size) in layers.iter().rev() {
        chain = Some(Arc::new(Sparse {
            zeroes: zeroes.to_vec(),
            size: *size,
            backing: chain.take().map(Backing::new),
            looks: Arc::clone(&looks),
        }));
    }
    (chain.unwrap(), looks)
}

/// What a range consists of: start, end, whether a layer has it, and which.
fn map(layer: &dyn Layer, start: u64, end: u64) -> Vec<(u64, u64, bool, u32)> {
    let mut found: Vec<(u64, u64, bool, u32)> = Vec::new();
    let mut visit = |_: &dyn Layer, Mapping { range, content, depth }: Mapping<'_>| {
        let is_zero = matches!(content, Content::Zero);
        let (start, end) = (range.offset().bytes(), range.end().bytes());
        match found.last_mut() {
            Some(last) if (last.1, last.2, last.3) == (start, is_zero, depth) => last.1 = end,
            _ => found.push((start, end, is_zero, depth)),
        }
        Ok(true)
    };
    let mut walk = Walk::new(Holes::Told, Lookup::MayRead, &mut visit);
    assert_eq!(layer.map(span(start, end), &mut walk).unwrap(), Mapped::Complete);
    found
}

#[test]
fn the_depth_of_a_chain_costs_look_ups_once() {
    let mut layers = vec![(&[][..], SIZE); 49];
    let bottom = [(GRANULE, 2 * GRANULE)];
    layers.push((&bottom, SIZE));
    let (top, looks) = chain(&layers);
    let read = |start: u64| {
        looks.store(0, Relaxed);
        let found = map(&*top, start, start + 4096);
        (found, looks.load(Relaxed))
    };
    let start = GRANULE + 8192;
    let (found, first) = read(start);
    assert_eq!(found, [(start, start + 4096, true, 50)]);
    assert!((50..=52).contains(&first), "{first} look-ups");
    // The top, and the layer that has it. Another part of the granule is known too.
    assert_eq!(read(start).1, 2);
    assert_eq!(read(start + 8192), (vec![(start + 8192, start + 12288, true, 50)], 2));
    // No layer has the next granule.
    assert!(read(2 * GRANULE).1 > 40);
    assert_eq!(read(2 * GRANULE), (vec![(2 * GRANULE, 2 * GRANULE + 4096, false, 0)], 1));
}

#[test]
fn what_the_top_has_costs_one_look_up_whatever_lies_below() {
    let zeroes = [(0, GRANULE)];
    let mut layers = vec![(&zeroes[..], SIZE)];
    layers.extend(vec![(&[][..], SIZE); 49]);
    let (top, looks) = chain(&layers);
    assert_eq!(map(&*top, 4096, 8192), [(4096, 8192, true, 1)]);
    assert_eq!(looks.load(Relaxed), 1);
}

#[test]
fn short_ranges_are_mapped_as_long_ones_are() {
    // Parts of granules, layers that end earlier, in the middle of a granule too.
    let layers: [(&[(u64, u64)], u64); 6] = [
        (&[(512, 1024), (5 * GRANULE, 6 * GRANULE + 512)], SIZE),
        (&[], 40 * GRANULE + 512),
        (&[(GRANULE + 512, GRANULE + 1024), (39 * GRANULE, 40 * GRANULE + 512)], 60 * GRANULE),
        (&[], 30 * GRANULE),
        (&[(GRANULE, 4 * GRANULE), (29 * GRANULE + 4096, 30 * GRANULE)], 30 * GRANULE),
        (&[(0, 10 * GRANULE - 512)], 50 * GRANULE),
    ];
    let (top, _) = chain(&layers);
    let mut walked = Vec::new();
    let mut visit = |_: &dyn Layer, Mapping { range, content, depth }: Mapping<'_>| {
        walked.push((range, matches!(content, Content::Zero), depth));
        Ok(true)
    };
    // Not from the top: layer by layer.
    let mut walk = Walk::new(Holes::Told, Lookup::MayRead, &mut visit);
    walk.depth = 1000;
    assert_eq!(top.map(span(0, SIZE), &mut walk).unwrap(), Mapped::Complete);
    let at = |position: u64| {
        let (_, is_zero, depth) = walked
            .iter()
            .find(|(range, ..)| (range.offset().bytes()..range.end().bytes()).contains(&position))
            .unwrap();
        (*is_zero, if *depth == 0 { 0 } else { *depth - 999 })
    };
    for _ in 0..2 {
        for length in [512, GRANULE, 3 * GRANULE + 512] {
            for start in (0..SIZE).step_by(512 * 37) {
                let end = SIZE.min(start + length);
                for (start, end, is_zero, depth) in map(&*top, start, end) {
                    assert_eq!((is_zero, depth), at(start), "at {start}");
                    assert_eq!((is_zero, depth), at(end - 1), "before {end}");
                }
            }
        }
    }
}
