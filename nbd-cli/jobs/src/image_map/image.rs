//! The map of an image and of the layers below it.

use std::path::PathBuf;
use std::sync::Arc;

use imgfmt::storage::FileIdentity;
use imgfmt::{Content, Extent, ExtentKind, GuestOffset, GuestRange, Image, Storage};

use super::entry::{Joined, MapEntry};

/// Passes the parts of an image to `each`, in order and without gaps. A part that no layer has is
/// not present. Blocks while metadata is read.
///
/// # Errors
///
/// If the metadata of a layer cannot be read, or the error of `each`, which ends the walk.
pub fn map_image<E: From<imgfmt::Error>>(
    image: &Image,
    each: impl FnMut(MapEntry) -> Result<(), E>,
) -> Result<(), E> {
    let mut entries = Joined::new(each);
    let layers = image.layer_sizes();
    let mut files = Files { of_image: image.files(), last: None };
    for extent in image.extents(image.whole()) {
        for extent in split_at_end_of_layer(extent?, &layers).into_iter().flatten() {
            parts(image, extent, &layers, &mut files, |entry| entries.add(entry))?;
        }
    }
    entries.end()
}

/// The range from `start` to `end`, which does not lie before.
fn span(start: u64, end: u64) -> GuestRange {
    GuestRange::between(GuestOffset::new(start), GuestOffset::new(end)).unwrap_or_default()
}

/// Splits an extent at the end of its layer. Past it the layer has no data, but hides the layers
/// below.
fn split_at_end_of_layer(extent: Extent, layers: &[u64]) -> [Option<Extent>; 2] {
    let (start, end) = (extent.range.offset().bytes(), extent.range.end().bytes());
    match (extent.depth as usize).checked_sub(1).and_then(|index| layers.get(index)) {
        Some(&size) if start < size && size < end => {
            [span(start, size), span(size, end)].map(|range| {
                let mut part = extent;
                part.range = range;
                Some(part)
            })
        }
        _ => [Some(extent), None],
    }
}

/// Returns the number, from 0, of the last layer that was examined for an extent that none has.
fn last_layer_asked(extent: Extent, layers: &[u64]) -> Option<u32> {
    let last = u32::try_from(layers.len()).unwrap_or(u32::MAX).saturating_sub(1);
    let Some(index) = extent.depth.checked_sub(1) else { return Some(last) };
    let size = layers.get(index as usize)?;
    // The layer ends before the extent, which therefore belongs to the one above.
    (extent.range.offset().bytes() >= *size).then(|| index.saturating_sub(1))
}

/// The files of an image, by number.
struct Files {
    of_image: Vec<(PathBuf, FileIdentity)>,
    /// The storage that was asked for last: few extents change it.
    last: Option<(*const (), Option<u32>)>,
}

impl Files {
    fn number_of(&mut self, storage: &Arc<dyn Storage>) -> Option<u32> {
        let address = Arc::as_ptr(storage).cast::<()>();
        if let Some((last, number)) = self.last
            && last == address
        {
            return number;
        }
        let identity = storage.identity();
        let number = self.of_image.iter().position(|(_, file)| Some(*file) == identity);
        let number = number.and_then(|number| u32::try_from(number).ok());
        self.last = Some((address, number));
        number
    }
}

/// Splits an extent by where its bytes are.
fn parts<E: From<imgfmt::Error>>(
    image: &Image,
    extent: Extent,
    layers: &[u64],
    files: &mut Files,
    mut each: impl FnMut(MapEntry) -> Result<(), E>,
) -> Result<(), E> {
    let absent = last_layer_asked(extent, layers);
    let part = |range: GuestRange, compressed, offset| MapEntry {
        start: range.offset().bytes(),
        length: range.length(),
        depth: absent.unwrap_or(extent.depth.saturating_sub(1)),
        present: absent.is_none(),
        zero: extent.kind != ExtentKind::Data,
        data: extent.kind == ExtentKind::Data,
        compressed,
        offset,
        is_kept: false,
        file: None,
    };
    if absent.is_some() {
        return each(part(extent.range, false, None));
    }
    let mut last_file = None;
    for mapping in image.map_read(extent.range)?.mappings() {
        let (is_entry, file) = match mapping.content {
            Content::File(span) => {
                let offset = span.is_file_content().then(|| span.offset.bytes());
                last_file = files.number_of(span.storage);
                each(MapEntry { file: last_file, ..part(mapping.range, false, offset) })?;
                continue;
            }
            Content::Encoded(encoded) => {
                each(part(mapping.range, encoded.is_compressed(), None))?;
                continue;
            }
            Content::Hole => (true, None),
            // Past the end of the file, which was cut off or has not grown to there yet.
            _ => (false, last_file),
        };
        zeroes(image, mapping.range, |range, place| {
            let is_kept = is_entry && place.is_some();
            let file = file.filter(|_| place.is_some());
            each(MapEntry { is_kept, file, ..part(range, false, place) })
        })?;
    }
    Ok(())
}

/// Splits zeroes by the places that files keep for them, or would have if they did not end before.
fn zeroes<E: From<imgfmt::Error>>(
    image: &Image,
    range: GuestRange,
    mut each: impl FnMut(GuestRange, Option<u64>) -> Result<(), E>,
) -> Result<(), E> {
    let mut result = Ok(());
    image.kept_for_zeroes(range, |range, place| {
        if result.is_ok() {
            result = each(range, place.map(|place| place.bytes()));
        }
    })?;
    result
}

#[cfg(test)]
mod tests {
    use imgfmt::{Access, CreateOptions, Durability, Format, OpenOptions};

    use super::*;

    #[test]
    fn parts_past_the_end_of_a_backing_file_belong_to_the_layer_above() {
        let directory = tempfile::tempdir().unwrap();
        let [base, overlay] = ["base.raw", "overlay.qcow2"].map(|name| directory.path().join(name));
        std::fs::write(&base, vec![1; 128 << 10]).unwrap();
        let mut options = CreateOptions::overlay("base.raw", Format::Raw);
        options.size = Some(512 << 10);
        Image::create(&overlay, &options).unwrap();
        let options = OpenOptions::new().access(Access::ReadWrite);
        let image = Image::open(&overlay, &options).unwrap();
        image.write_at(GuestOffset::new(0), &[2; 64 << 10], Durability::Cached).unwrap();
        let mut found = Vec::new();
        map_image(&image, |entry| {
            found.push((entry.start >> 10, entry.length >> 10, entry.depth, entry.present));
            Ok::<_, imgfmt::Error>(())
        })
        .unwrap();
        assert_eq!(found, [(0, 64, 0, true), (64, 64, 1, true), (128, 384, 0, false)]);
    }

    #[test]
    fn an_error_of_the_caller_ends_the_walk() {
        let storage = Arc::new(imgfmt::storage::MemoryStorage::new(4096));
        let image = Image::from_storage(storage, &OpenOptions::new().format(Format::Raw)).unwrap();
        let full = |_| Err(Box::<dyn std::error::Error>::from("the disk is full"));
        assert_eq!(map_image(&image, full).unwrap_err().to_string(), "the disk is full");
    }
}
