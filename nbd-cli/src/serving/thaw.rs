//! Reports on bits that a checkpoint had frozen and that are back in their bitmaps.

use imgfmt::Image;

use crate::output::{printable, warn};

/// Reports which bitmaps got frozen bits back when an image was opened for writing, and whether
/// that failed.
pub(crate) fn report_thaw(image: &Image) {
    let status = image.bitmap_durability();
    report_thawed(&status.thawed);
    if let Some(failure) = status.thaw_failure {
        // The disk can be used anyway, but not the bitmaps that lack them.
        warn(&format!("bits frozen by a checkpoint are not merged back: {failure}"));
    }
}

/// Reports which bitmaps got frozen bits back.
pub(crate) fn report_thawed(names: &[String]) {
    if !names.is_empty() {
        let names: Vec<_> = names.iter().map(|name| format!("'{}'", printable(name))).collect();
        warn(&format!(
            "a checkpoint was interrupted; the bits that it had frozen are back in {}",
            names.join(", ")
        ));
    }
}
