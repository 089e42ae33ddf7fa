//! Lists of bitmaps.

use imgfmt::{BitmapInfo, BitmapState, Image, Recording};
use serde::Serialize;

use crate::error::CommandError;
use crate::output::{Output, printable};
use crate::size::rounded;

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonReport<'a> {
    virtual_size: u64,
    bitmaps: Vec<JsonBitmap<'a>>,
    /// The reason why bitmaps in the image cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    damage: Option<String>,
}

/// The first three keys are those of qemu-img.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonBitmap<'a> {
    name: &'a str,
    granularity: u64,
    flags: Vec<&'static str>,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    dirty_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// Prints one JSON object.
pub(super) fn json(image: &Image, output: &mut Output) -> Result<(), CommandError> {
    let bitmaps = image.bitmaps();
    let bitmaps = bitmaps.iter().map(JsonBitmap::from).collect();
    let report = JsonReport { virtual_size: image.size(), bitmaps, damage: image.bitmap_damage() };
    output.json(&report)
}

/// Prints one line per bitmap: granularity, recording state, dirty bytes, name.
pub(super) fn text(image: &Image, output: &mut Output) -> Result<(), CommandError> {
    if let Some(damage) = image.bitmap_damage() {
        output.line(&format!("the bitmaps cannot be found: {}", printable(&damage)))?;
    }
    for bitmap in image.bitmaps() {
        let recording = match bitmap.recording {
            Recording::Enabled => "enabled",
            Recording::Disabled => "disabled",
        };
        let state = match &bitmap.state {
            BitmapState::Consistent { dirty_bytes } => format!("{} dirty", rounded(*dirty_bytes)),
            BitmapState::Inconsistent { reason } => format!("inconsistent: {}", printable(reason)),
            BitmapState::Damaged { reason } => format!("damaged: {}", printable(reason)),
            BitmapState::Incomplete { .. } => match bitmap.state.problem() {
                Some(problem) => format!("incomplete: {}", printable(&problem)),
                None => "incomplete".into(),
            },
            _ => "unknown".into(),
        };
        output.line(&format!(
            "{:>8}  {recording:<8}  {}  {state}",
            rounded(bitmap.granularity),
            printable(&bitmap.name),
        ))?;
    }
    Ok(())
}

impl<'a> From<&'a BitmapInfo> for JsonBitmap<'a> {
    fn from(bitmap: &'a BitmapInfo) -> Self {
        let flags =
            [(bitmap.is_in_use, "in-use"), (bitmap.recording == Recording::Enabled, "auto")];
        let (state, dirty_bytes) = match &bitmap.state {
            BitmapState::Consistent { dirty_bytes } => ("consistent", Some(*dirty_bytes)),
            BitmapState::Inconsistent { .. } => ("inconsistent", None),
            BitmapState::Damaged { .. } => ("damaged", None),
            BitmapState::Incomplete { .. } => ("incomplete", None),
            _ => ("unknown", None),
        };
        Self {
            name: &bitmap.name,
            granularity: bitmap.granularity,
            flags: flags.into_iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).collect(),
            state,
            dirty_bytes,
            reason: bitmap.state.problem(),
        }
    }
}
