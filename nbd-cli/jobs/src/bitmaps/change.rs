//! Changes of bitmaps, each complete or not at all.

use imgfmt::{BITMAP_GRANULARITY_DEFAULT, BitmapChange, Image};

use crate::error::JobError;
use crate::frozen_bits::{
    check_complete, explain_change, report_thaw, report_thaw_failure, report_thawed,
};
use crate::observer::Observer;

/// The finest default granularity, in bytes.
const GRANULARITY_DEFAULT_MIN: u64 = 4 << 10;

/// Makes changes in one step: all of them or none, even if it is interrupted. `changes` sees the
/// image first. Frozen bits of a checkpoint that was cut off are merged back, before or after, and
/// reported to `observer`; so is a failure of that, which does not undo the changes. No checkpoint
/// of the image may be in progress.
///
/// # Errors
///
/// The error of `changes`; with the remedy if frozen bits are the reason; or if the image cannot be
/// written.
pub fn change_bitmaps<E: From<imgfmt::Error> + From<JobError>>(
    image: &Image,
    observer: &dyn Observer,
    changes: impl FnOnce(&Image) -> Result<Vec<BitmapChange>, E>,
) -> Result<(), E> {
    report_thaw(image, observer);
    let changes = changes(image)?;
    image.bitmap_transaction(&changes).map_err(|error| explain_change(image, &changes, error))?;
    // A repair may have made that possible. The changes are on disk, whether it succeeds or not.
    match image.thaw_bitmaps() {
        Ok(thawed) => report_thawed(&thawed, observer),
        Err(failure) => report_thaw_failure(&failure, observer),
    }
    Ok(())
}

/// Returns the granularity that QEMU chooses for a new bitmap of an image, in bytes: the size of a
/// cluster, but at least 4 KiB and at most 64 KiB.
///
/// # Errors
///
/// If the header of the image cannot be read.
pub fn granularity_default(image: &Image) -> imgfmt::Result<u64> {
    let cluster_size = image.info()?.qcow2.map_or(0, |qcow2| qcow2.cluster_size);
    Ok(cluster_size.clamp(GRANULARITY_DEFAULT_MIN, BITMAP_GRANULARITY_DEFAULT))
}

/// Returns the changes that add the bits of bitmaps of another image to `into`. That image may be
/// closed before they are made: one of the two may be the other's backing file.
///
/// # Errors
///
/// If a bitmap does not exist, cannot be relied on, or lacks bits that a checkpoint has frozen.
pub fn merges_from<E: From<imgfmt::Error> + From<JobError>>(
    other: &Image,
    names: &[String],
    into: &str,
) -> Result<Vec<BitmapChange>, E> {
    let mut changes = Vec::new();
    for name in names {
        check_complete(other, name)?;
        let from = other.dirty_bits(name)?;
        changes.push(BitmapChange::MergeBits { into: into.to_owned(), from });
    }
    Ok(changes)
}

/// Checks that no bitmap lacks bits that a checkpoint has frozen.
///
/// # Errors
///
/// With the reason and the remedy for the first bitmap that does.
pub fn check_all_complete(image: &Image) -> Result<(), JobError> {
    image.bitmaps().iter().try_for_each(|bitmap| check_complete(image, &bitmap.name))
}

#[cfg(test)]
mod tests {
    use imgfmt::{Access, CreateOptions, Durability, Format, GuestOffset, OpenOptions, Recording};

    use super::*;
    use crate::bitmaps::BitmapList;
    use crate::observer::JobContext;

    type Failure = Box<dyn std::error::Error>;

    fn image(path: &std::path::Path) -> Image {
        Image::create(path, &CreateOptions::new(Format::Qcow2, 1 << 20)).unwrap();
        Image::open(path, &OpenOptions::new().access(Access::ReadWrite)).unwrap()
    }

    fn change(image: &Image, changes: Vec<BitmapChange>) -> Result<(), Failure> {
        change_bitmaps(image, &*JobContext::default().observer, |_| Ok(changes))
    }

    fn add(name: &str, recording: Recording) -> BitmapChange {
        BitmapChange::Add { name: name.to_owned(), granularity: 65536, recording }
    }

    fn dirty(image: &Image, name: &str) -> Option<u64> {
        let list = BitmapList::of(image);
        list.bitmaps.iter().find(|bitmap| bitmap.name == name).and_then(|bitmap| bitmap.dirty_bytes)
    }

    #[test]
    fn bits_of_another_image_are_added() {
        let directory = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| image(&directory.path().join(name)));
        change(&other, vec![add("b", Recording::Enabled)]).unwrap();
        other.write_at(GuestOffset::new(70_000), &[1; 10], Durability::Cached).unwrap();
        change(&one, vec![add("b", Recording::Disabled)]).unwrap();
        assert_eq!(dirty(&one, "b"), Some(0));
        let merges = merges_from::<Failure>(&other, &["b".to_owned()], "b").unwrap();
        change(&one, merges).unwrap();
        assert_eq!(dirty(&one, "b"), Some(65536));
        assert!(merges_from::<Failure>(&other, &["nothing".to_owned()], "b").is_err());
        check_all_complete(&one).unwrap();
    }

    #[test]
    fn a_change_that_fails_takes_the_others_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let image = image(&directory.path().join("disk"));
        let missing = BitmapChange::Clear { name: "missing".to_owned() };
        assert!(change(&image, vec![add("b", Recording::Enabled), missing]).is_err());
        assert!(BitmapList::of(&image).bitmaps.is_empty());
    }

    #[test]
    fn the_default_granularity_is_that_of_clusters_within_limits() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(granularity_default(&image(&directory.path().join("a"))).unwrap(), 65536);
        let raw = directory.path().join("raw");
        std::fs::write(&raw, [0; 4096]).unwrap();
        let raw = Image::open(&raw, &OpenOptions::new().format(Format::Raw)).unwrap();
        assert_eq!(granularity_default(&raw).unwrap(), 4096);
    }
}
