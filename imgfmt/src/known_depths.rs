//! A cache of the layers of a chain that have no content for a part of the disk.
//!
//! Where the top of a chain of 50 images has no content, up to 49 tables must be examined to find
//! the data. The layers below the top do not change, so a result stays valid. It is, for each
//! granule of the disk, the number of layers that have no content in all of it. Memory is bounded;
//! a granule can displace another one, which is then looked up again.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::units::{GuestRange, span};

/// A granule is `1 << GRANULE_BITS` bytes: a cluster of the usual size.
const GRANULE_BITS: u32 = 16;

/// Maximum number of cached granules: 4 MiB of memory, for 32 GiB of disk.
const PLACES_MAX: u64 = 1 << 19;

/// Ranges of up to this many bytes are looked up by granules; longer ones are walked, which costs
/// little per byte.
pub(crate) const RANGE_MAX: u64 = 4 << 20;

/// The number of layers without content, for each granule.
#[derive(Debug)]
pub(crate) struct KnownDepths<L: ?Sized> {
    /// The layers below the top, in order.
    pub(crate) layers: Vec<Arc<L>>,
    /// Numbers of granules, plus one, and in the lowest 16 bits the number of layers without
    /// content there.
    places: Box<[AtomicU64]>,
}

impl<L: ?Sized> KnownDepths<L> {
    /// For a chain whose first layer below the top has `size` bytes.
    pub(crate) fn new(layers: Vec<Arc<L>>, size: u64) -> Self {
        let count = size.div_ceil(1 << GRANULE_BITS).clamp(1, PLACES_MAX).next_power_of_two();
        Self { layers, places: (0..count).map(|_| AtomicU64::new(0)).collect() }
    }

    /// The number of layers, from the first one on, without content in a granule, if it is known.
    pub(crate) fn get(&self, granule: Granule) -> Option<usize> {
        let found = self.place(granule).load(Relaxed);
        (found >> 16 == granule.0 + 1).then_some((found & 0xffff) as usize)
    }

    pub(crate) fn note(&self, granule: Granule, layers: usize) {
        if let Ok(layers) = u16::try_from(layers) {
            self.place(granule).store((granule.0 + 1) << 16 | u64::from(layers), Relaxed);
        }
    }

    fn place(&self, granule: Granule) -> &AtomicU64 {
        // The count is a power of two.
        &self.places[granule.0 as usize & (self.places.len() - 1)]
    }
}

/// A part of the disk, with the layer that has its content.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Granule(u64);

impl Granule {
    pub(crate) fn of(guest: u64) -> Self {
        Self(guest >> GRANULE_BITS)
    }

    pub(crate) fn range(self) -> GuestRange {
        span(self.0 << GRANULE_BITS, (self.0 + 1) << GRANULE_BITS)
    }
}

/// Created when it is first needed.
pub(crate) type Lazy<L> = OnceLock<KnownDepths<L>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_granule_is_known_until_its_place_is_taken() {
        let known: KnownDepths<()> = KnownDepths::new(Vec::new(), 1 << 62);
        assert_eq!(known.places.len() as u64, PLACES_MAX);
        let (first, second) = (Granule::of(5 << 16), Granule::of((PLACES_MAX + 5) << 16));
        assert_eq!(known.get(first), None);
        known.note(first, 49);
        assert_eq!((known.get(first), known.get(second)), (Some(49), None));
        known.note(second, 0);
        assert_eq!((known.get(first), known.get(second)), (None, Some(0)));
        // A number of layers that no chain has is not remembered.
        known.note(first, 1 << 16);
        assert_eq!(known.get(first), None);
    }
}
