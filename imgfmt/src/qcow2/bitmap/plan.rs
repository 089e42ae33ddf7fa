//! The list of bitmaps as it is to be.

use std::sync::Arc;

use super::directory::Entry;
use super::error::no_bitmap;
use crate::bitmap::{Bitmap, Bits};
use crate::error::Result;

/// A bitmap as it is to be.
#[derive(Clone, Debug)]
pub(super) struct Planned {
    pub(super) bitmap: Bitmap<Entry>,
    /// Bits that replace those it has.
    pub(super) content: Option<Arc<Bits>>,
    /// What is stored is to be replaced by its bits as they are now.
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
