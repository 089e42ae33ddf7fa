//! The planned list of bitmaps.

use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use super::directory::Entry;
use super::error::no_bitmap;
use crate::bitmap::{Bitmap, Bits, Condition};
use crate::error::Result;

/// A planned bitmap.
#[derive(Clone, Debug)]
pub(super) struct Planned {
    pub(super) bitmap: Bitmap<Entry>,
    /// Bits that replace the bitmap's own.
    pub(super) content: Option<Arc<Bits>>,
    /// Whether the stored bits are to be replaced by the bits in memory.
    pub(super) must_store: bool,
}

impl Planned {
    pub(super) fn unchanged(bitmap: &Bitmap<Entry>) -> Self {
        Self { bitmap: bitmap.clone(), content: None, must_store: false }
    }

    /// The bitmaps as they are. Those whose stored bits are out of date are stored.
    pub(super) fn to_store(bitmaps: &[Bitmap<Entry>]) -> Vec<Self> {
        let must_store = |bitmap: &Bitmap<Entry>| {
            bitmap.condition == Condition::Ready && bitmap.in_use.load(Acquire)
        };
        let planned = bitmaps
            .iter()
            .map(|bitmap| Self { must_store: must_store(bitmap), ..Self::unchanged(bitmap) });
        planned.collect()
    }
}

pub(super) fn position(plan: &[Planned], name: &str) -> Result<usize> {
    plan.iter().position(|planned| planned.bitmap.name == name).ok_or_else(|| no_bitmap(name))
}

pub(super) fn at<'a>(plan: &'a mut [Planned], name: &str) -> Result<&'a mut Planned> {
    let index = position(plan, name)?;
    Ok(&mut plan[index])
}
