//! Lists of bitmaps.

use imgfmt::{BitmapInfo, BitmapState, Image};
use serde::Serialize;

use crate::image_report::bitmap_flags;

/// The bitmaps of an image.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct BitmapList {
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// The bitmaps.
    pub bitmaps: Vec<ListedBitmap>,
    /// The reason why bitmaps in the image cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damage: Option<String>,
}

/// A bitmap. The first three keys are those of qemu-img.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct ListedBitmap {
    /// The name.
    pub name: String,
    /// Bytes of the disk per bit.
    pub granularity: u64,
    /// Those of `in-use` and `auto` that are set.
    pub flags: Vec<&'static str>,
    /// `consistent`, `inconsistent`, `damaged`, `incomplete` or `unknown`.
    pub state: &'static str,
    /// Bytes of the disk that are dirty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_bytes: Option<u64>,
    /// What is wrong with the bitmap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl BitmapList {
    /// Returns the bitmaps of an image in their current states.
    #[must_use]
    pub fn of(image: &Image) -> Self {
        let bitmaps = image.bitmaps().iter().map(ListedBitmap::from).collect();
        Self { virtual_size: image.size(), bitmaps, damage: image.bitmap_damage() }
    }
}

impl From<&BitmapInfo> for ListedBitmap {
    fn from(bitmap: &BitmapInfo) -> Self {
        let (state, dirty_bytes) = match &bitmap.state {
            BitmapState::Consistent { dirty_bytes } => ("consistent", Some(*dirty_bytes)),
            BitmapState::Inconsistent { .. } => ("inconsistent", None),
            BitmapState::Damaged { .. } => ("damaged", None),
            BitmapState::Incomplete { .. } => ("incomplete", None),
            _ => ("unknown", None),
        };
        Self {
            name: bitmap.name.clone(),
            granularity: bitmap.granularity,
            flags: bitmap_flags(bitmap.is_in_use, bitmap.recording),
            state,
            dirty_bytes,
            reason: bitmap.state.problem(),
        }
    }
}
