//! Extents: the parts of a disk that hold data, and their layers.

use crate::units::GuestRange;

/// The content of a part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Bytes that must be read to be known.
    Data,
    /// Space is allocated, and it reads as zero.
    Zero,
    /// No space is allocated, and it reads as zero.
    Hole,
}

/// A part of a disk that is of one kind throughout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Extent {
    /// The range; never empty.
    pub range: GuestRange,
    /// Its content.
    pub kind: ExtentKind,
    /// The layer that decides its content: 1 is the image itself, 2 its backing file and so on;
    /// 0 means that no layer has it. A raw image is allocated everywhere, holes included.
    pub depth: u32,
}

impl Extent {
    /// Appends the extent that follows, if both are of the same kind and depth.
    pub(crate) fn join(&mut self, next: &Self) -> bool {
        let is_alike = (self.kind, self.depth) == (next.kind, next.depth);
        if is_alike
            && self.range.end() == next.range.offset()
            && let Some(joined) = GuestRange::between(self.range.offset(), next.range.end())
        {
            self.range = joined;
            return true;
        }
        false
    }
}

/// Collects neighbouring extents, joins equal ones, and stops at a maximum number.
#[derive(Debug)]
pub(crate) struct ExtentList {
    extents: Vec<Extent>,
    max_count: usize,
}

impl ExtentList {
    pub(crate) fn new(max_count: usize) -> Self {
        Self { extents: Vec::new(), max_count }
    }

    /// Appends the extent that follows. Returns false if the list is full; the extent was then
    /// dropped.
    pub(crate) fn push(&mut self, extent: Extent) -> bool {
        if extent.range.is_empty() {
            return true;
        }
        if let Some(last) = self.extents.last_mut()
            && last.join(&extent)
        {
            return true;
        }
        if self.extents.len() >= self.max_count {
            return false;
        }
        self.extents.push(extent);
        true
    }

    pub(crate) fn into_vec(self) -> Vec<Extent> {
        self.extents
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::GuestOffset;

    fn extent(offset: u64, length: u64, kind: ExtentKind) -> Extent {
        let range = GuestRange::new(GuestOffset::new(offset), length).unwrap();
        Extent { range, kind, depth: 1 }
    }

    #[test]
    fn like_neighbours_are_joined_and_the_number_is_bounded() {
        let mut list = ExtentList::new(2);
        assert!(list.push(extent(0, 10, ExtentKind::Data)));
        assert!(list.push(extent(10, 10, ExtentKind::Data)));
        assert!(list.push(extent(20, 10, ExtentKind::Hole)));
        assert!(list.push(extent(30, 1, ExtentKind::Hole)));
        assert!(!list.push(extent(31, 1, ExtentKind::Data)));
        let expected = vec![extent(0, 20, ExtentKind::Data), extent(20, 11, ExtentKind::Hole)];
        assert_eq!(list.into_vec(), expected);
    }
}
