//! The planned list of bitmaps.

use std::sync::Arc;

use super::directory::Entry;
use super::error::no_bitmap;
use crate::bitmap::{Bitmap, Bits};
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
}

pub(super) fn position(plan: &[Planned], name: &str) -> Result<usize> {
    plan.iter().position(|planned| planned.bitmap.name == name).ok_or_else(|| no_bitmap(name))
}

pub(super) fn at<'a>(plan: &'a mut [Planned], name: &str) -> Result<&'a mut Planned> {
    let index = position(plan, name)?;
    Ok(&mut plan[index])
}
