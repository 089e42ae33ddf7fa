//! Typed offsets and ranges.
//!
//! An offset on the virtual disk and an offset in a host file are both 64-bit byte counts. Confusing
//! them destroys data without an error, so they are different types.

use std::fmt;

/// A byte offset on the virtual disk, as the guest or network client sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(u64);

/// A byte offset in the host file (or block device) that stores the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(u64);

macro_rules! offset {
    ($name:ident) => {
        impl $name {
            /// The offset `bytes` from the start.
            pub const fn new(bytes: u64) -> Self {
                Self(bytes)
            }

            /// The offset in bytes.
            pub const fn bytes(self) -> u64 {
                self.0
            }

            /// The offset `length` bytes further on, or `None` if that does not fit into 64 bits.
            pub const fn checked_add(self, length: u64) -> Option<Self> {
                match self.0.checked_add(length) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }
        }

        impl From<u64> for $name {
            fn from(bytes: u64) -> Self {
                Self(bytes)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

offset!(GuestOffset);
offset!(HostOffset);

/// A range of the virtual disk whose end fits into 64 bits.
///
/// ```
/// use imgfmt::{GuestOffset, GuestRange};
///
/// let range = GuestRange::new(GuestOffset::new(4096), 512).expect("ends below 2^64");
/// assert_eq!(range.end().bytes(), 4608);
/// assert!(GuestRange::new(GuestOffset::new(u64::MAX), 2).is_none());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct GuestRange {
    offset: GuestOffset,
    length: u64,
}

impl GuestRange {
    /// A range of `length` bytes from `offset`, or `None` if it would end beyond 2^64 - 1.
    pub const fn new(offset: GuestOffset, length: u64) -> Option<Self> {
        match offset.checked_add(length) {
            Some(_) => Some(Self { offset, length }),
            None => None,
        }
    }

    /// The range from `start` to `end` (excluded), or `None` if `end` lies before `start`.
    pub const fn between(start: GuestOffset, end: GuestOffset) -> Option<Self> {
        match end.0.checked_sub(start.0) {
            Some(length) => Some(Self { offset: start, length }),
            None => None,
        }
    }

    /// Where the range starts.
    pub const fn offset(self) -> GuestOffset {
        self.offset
    }

    /// How many bytes it covers.
    pub const fn length(self) -> u64 {
        self.length
    }

    /// The first byte behind the range.
    pub const fn end(self) -> GuestOffset {
        // The constructors refuse a range whose end does not fit.
        GuestOffset(self.offset.0 + self.length)
    }

    /// Whether the range covers no byte at all.
    pub const fn is_empty(self) -> bool {
        self.length == 0
    }

    /// The part that lies in both ranges; empty (at the start of `self`) if there is none.
    pub fn intersection(self, other: Self) -> Self {
        let start = self.offset.max(other.offset);
        let end = self.end().min(other.end());
        Self::between(start, end).unwrap_or(Self { offset: self.offset, length: 0 })
    }
}

impl fmt::Display for GuestRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at offset {}", self.length, self.offset)
    }
}

/// The range from `start` to `end`, which does not lie before.
#[inline]
pub(crate) fn span(start: u64, end: u64) -> GuestRange {
    GuestRange::between(GuestOffset::new(start), GuestOffset::new(end)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, length: u64) -> GuestRange {
        GuestRange::new(GuestOffset::new(offset), length).unwrap()
    }

    #[test]
    fn a_range_never_ends_beyond_64_bits() {
        assert_eq!(GuestRange::new(GuestOffset::new(u64::MAX), 1), None);
        assert_eq!(range(u64::MAX, 0).end().bytes(), u64::MAX);
        assert_eq!(GuestRange::between(GuestOffset::new(5), GuestOffset::new(4)), None);
    }

    #[test]
    fn the_intersection_of_ranges_that_do_not_touch_is_empty() {
        assert_eq!(range(0, 10).intersection(range(5, 10)), range(5, 5));
        assert_eq!(range(3, 4).intersection(range(100, 10)), range(3, 0));
    }
}
