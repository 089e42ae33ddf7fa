//! The entries of a map.

use serde::Serialize;

/// A range of the disk, with the keys of qemu-img. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct MapEntry {
    /// Start of the range on the disk.
    pub start: u64,
    /// Length of the range.
    pub length: u64,
    /// The layer that has the range: 0 is the image itself, 1 its backing file and so on. If no
    /// layer has it, the last layer that was examined.
    pub depth: u32,
    /// Whether a layer has the range.
    pub present: bool,
    /// Whether the range is known to read as zero.
    pub zero: bool,
    /// Whether the range is stored as data.
    pub data: bool,
    /// Whether the data is compressed.
    pub compressed: bool,
    /// Offset of the data in the file of its layer, or in the export; none if the file has it in
    /// another form.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Whether `offset` is a place that is only kept: the entry of the range makes it zero.
    #[serde(skip)]
    pub is_kept: bool,
    /// The number of the file that `offset` is in, among the files of the image.
    #[serde(skip)]
    pub file: Option<u32>,
}

impl MapEntry {
    /// Extends the entry by the following one if that is alike; returns whether it did.
    fn join(&mut self, next: &Self) -> bool {
        let follows = match (self.offset, next.offset) {
            (Some(offset), Some(next)) => offset.checked_add(self.length) == Some(next),
            (None, None) => true,
            _ => false,
        };
        let parts = |part: &Self| (part.depth, part.present, part.zero, part.data, part.compressed);
        let places = |part: &Self| (part.is_kept, part.file);
        let joins = follows && parts(self) == parts(next) && places(self) == places(next);
        if joins {
            self.length += next.length;
        }
        joins
    }
}

/// Passes entries on in order, and joins adjacent ones that are alike.
pub(super) struct Joined<F> {
    each: F,
    pending: Option<MapEntry>,
}

impl<F: FnMut(MapEntry) -> Result<(), E>, E> Joined<F> {
    pub(super) fn new(each: F) -> Self {
        Self { each, pending: None }
    }

    pub(super) fn add(&mut self, entry: MapEntry) -> Result<(), E> {
        if self.pending.as_mut().is_some_and(|pending| pending.join(&entry)) {
            return Ok(());
        }
        self.pending.replace(entry).map_or(Ok(()), &mut self.each)
    }

    /// Passes the last entry on.
    pub(super) fn end(mut self) -> Result<(), E> {
        self.pending.take().map_or(Ok(()), &mut self.each)
    }
}

#[cfg(test)]
mod tests {
    use super::{Joined, MapEntry};

    #[test]
    fn parts_are_joined_only_if_the_file_goes_on_too() {
        let part = |start, offset| MapEntry {
            start,
            length: 10,
            depth: 0,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            offset,
            is_kept: false,
            file: None,
        };
        let mut first = part(0, Some(100));
        assert!(!first.join(&part(10, Some(120))));
        assert!(!first.join(&part(10, None)));
        assert!(first.join(&part(10, Some(110))));
        assert_eq!(first.length, 20);

        let mut lengths = Vec::new();
        let mut joined = Joined::new(|entry: MapEntry| {
            lengths.push(entry.length);
            Ok::<_, ()>(())
        });
        for offset in [100, 110, 120, 200] {
            joined.add(part(0, Some(offset))).unwrap();
        }
        joined.end().unwrap();
        assert_eq!(lengths, [30, 10]);
    }
}
