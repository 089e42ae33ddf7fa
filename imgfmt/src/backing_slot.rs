//! The layer below an image, which can be taken away while the image is read.
//!
//! A reader that finds no content in the image's own tables takes the layer below *after* that. If
//! the slot has changed since the reader began, it looks into the tables again: everything that the
//! old layer provided is in them by then. So reads of what the image has itself pay one load, and
//! no reader uses a layer for a part that has become the image's own, and was discarded there.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};

use crate::layer::{Backing, Layer};
use crate::ordered_lock::{OrderedMutex, rank};
use crate::per_thread::PerThread;
use crate::wanted::Wanted;

/// The place of the layer below.
#[derive(Debug, Default)]
pub(crate) struct BackingSlot {
    /// How often the layer was replaced.
    changes: AtomicU64,
    content: Content,
    /// Where readers have found the layer, if a job copies it.
    pub(crate) wanted: Wanted,
}

#[derive(Debug, Default)]
enum Content {
    #[default]
    Nothing,
    /// The layer of an image that is itself below another one.
    Fixed(Backing),
    /// Each thread takes its own reference, so that threads do not contend.
    Replaceable(PerThread<OrderedMutex<{ rank::BACKING }, Arc<Attached>>>),
}

/// What the slot had at one moment. While this lives, the layers stay open.
#[derive(Debug)]
pub(crate) struct Attached {
    changes: u64,
    backing: Option<Arc<Backing>>,
    /// All layers, so that the last user drops them one by one, and none drops the next one.
    _layers: Arc<[Arc<dyn Layer>]>,
}

impl BackingSlot {
    /// How often the layer was replaced, to be compared with [`Attached::changes`].
    #[inline]
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Acquire)
    }

    /// The layer, if it cannot be replaced.
    #[inline]
    pub(crate) fn fixed(&self) -> Option<&Backing> {
        match &self.content {
            Content::Fixed(backing) => Some(backing),
            Content::Nothing | Content::Replaceable(_) => None,
        }
    }

    /// What the slot has now, if that can be replaced.
    #[inline]
    pub(crate) fn attached(&self) -> Option<Arc<Attached>> {
        match &self.content {
            Content::Replaceable(places) => Some(Arc::clone(&places.mine().lock())),
            Content::Nothing | Content::Fixed(_) => None,
        }
    }

    /// Passes the layer that is there now to a function.
    pub(crate) fn with<T>(&self, with: impl FnOnce(Option<&Backing>) -> T) -> T {
        let attached = self.attached();
        with(self.fixed().or_else(|| attached.as_ref()?.backing()))
    }

    /// The size of the layer's disk in bytes; 0 without one.
    pub(crate) fn size(&self) -> u64 {
        self.with(|backing| backing.map_or(0, |backing| backing.size))
    }

    /// Puts a layer there that stays.
    pub(crate) fn fix(&mut self, layer: Arc<dyn Layer>) {
        self.content = Content::Fixed(Backing::new(layer));
    }

    /// Puts the first of `layers` there, which can be replaced; they are all that are below, in
    /// order.
    pub(crate) fn attach(&mut self, layers: &Arc<[Arc<dyn Layer>]>) {
        let new = Attached::all(layers, 0);
        self.content = Content::Replaceable(PerThread::new(|| OrderedMutex::new(new())));
    }

    /// Replaces the layer by the first of `layers`. What the old one provided is in the image.
    pub(crate) fn replace(&self, layers: &Arc<[Arc<dyn Layer>]>) {
        let Content::Replaceable(places) = &self.content else { return };
        let changes = self.changes() + 1;
        let new = Attached::all(layers, changes);
        for place in places.all() {
            let old = std::mem::replace(&mut *place.lock(), new());
            // Dropping layers closes files, so it is not done under the lock.
            drop(old);
        }
        self.changes.store(changes, Release);
    }
}

impl Attached {
    /// Makes one for each thread; they share the layers.
    fn all(layers: &Arc<[Arc<dyn Layer>]>, changes: u64) -> impl Fn() -> Arc<Self> {
        let layers = Arc::clone(layers);
        let backing = layers.first().map(|first| Arc::new(Backing::new(Arc::clone(first))));
        move || {
            let (backing, _layers) = (backing.clone(), Arc::clone(&layers));
            Arc::new(Self { changes, backing, _layers })
        }
    }

    #[inline]
    pub(crate) fn backing(&self) -> Option<&Backing> {
        self.backing.as_deref()
    }

    /// How often the layer had been replaced.
    #[inline]
    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_began_before_a_change_is_told_whenever_it_looks() {
        let never = BackingSlot::default();
        assert!(never.attached().is_none() && never.fixed().is_none());
        let mut slot = BackingSlot::default();
        let nothing: Arc<[Arc<dyn Layer>]> = Arc::default();
        slot.attach(&nothing);
        let before = slot.changes();
        assert_eq!(slot.attached().unwrap().changes(), before);
        slot.replace(&nothing);
        std::thread::scope(|scope| {
            for _ in 0..9 {
                scope.spawn(|| {
                    let attached = slot.attached().unwrap();
                    assert_ne!(attached.changes(), before);
                    assert_eq!(attached.changes(), slot.changes());
                });
            }
        });
    }
}
