//! Typed offsets and ranges.
//!
//! An offset on the virtual disk and an offset in a host file are both 64-bit byte counts.
//! Confusing them would destroy data without an error, so they are different types.

use std::fmt;
use std::ops::{Add, AddAssign, Sub};

/// A byte offset on the virtual disk, as the guest or network client sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(u64);

/// A byte offset in the host file (or block device) that stores the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(u64);

macro_rules! offset {
    ($name:ident) => {
        impl $name {
            /// Creates the offset of this many bytes.
            pub const fn new(bytes: u64) -> Self {
                Self(bytes)
            }

            /// Returns the offset in bytes.
            pub const fn bytes(self) -> u64 {
                self.0
            }

            /// Returns the offset `length` bytes further on, or `None` if it does not fit into 64
            /// bits.
            pub const fn checked_add(self, length: u64) -> Option<Self> {
                match self.0.checked_add(length) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }
        }

        /// The offset this many bytes further on. It overflows as `u64` does, so the caller must
        /// know that it fits into 64 bits; otherwise use `checked_add`.
        impl Add<u64> for $name {
            type Output = Self;

            #[inline]
            fn add(self, length: u64) -> Self {
                Self(self.0 + length)
            }
        }

        impl AddAssign<u64> for $name {
            #[inline]
            fn add_assign(&mut self, length: u64) {
                self.0 += length;
            }
        }

        /// The distance in bytes from an offset that is not after this one.
        impl Sub for $name {
            type Output = u64;

            #[inline]
            fn sub(self, start: Self) -> u64 {
                self.0 - start.0
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
    /// Creates a range of `length` bytes from `offset`, or `None` if it would end beyond 2^64 - 1.
    pub const fn new(offset: GuestOffset, length: u64) -> Option<Self> {
        match offset.checked_add(length) {
            Some(_) => Some(Self { offset, length }),
            None => None,
        }
    }

    /// Creates the range from `start` to `end` (excluded), or `None` if `end` is before `start`.
    pub const fn between(start: GuestOffset, end: GuestOffset) -> Option<Self> {
        match end.0.checked_sub(start.0) {
            Some(length) => Some(Self { offset: start, length }),
            None => None,
        }
    }

    /// Returns the start of the range.
    pub const fn offset(self) -> GuestOffset {
        self.offset
    }

    /// Returns the length in bytes.
    pub const fn length(self) -> u64 {
        self.length
    }

    /// Returns the offset of the first byte after the range.
    pub const fn end(self) -> GuestOffset {
        // The constructors refuse a range whose end does not fit.
        GuestOffset(self.offset.0 + self.length)
    }

    /// Returns whether the range is empty.
    pub const fn is_empty(self) -> bool {
        self.length == 0
    }

    /// Returns the part that is in both ranges; empty (at the start of `self`) if there is none.
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

/// The arithmetic that guest and host offsets share.
pub(crate) trait Offset: Copy + Ord + Add<u64, Output = Self> {
    /// The offset `bytes` from the start.
    fn at(bytes: u64) -> Self;

    /// The offset in bytes.
    fn value(self) -> u64;

    /// The offset `length` bytes further on, or the largest if that does not fit into 64 bits.
    #[inline]
    fn saturating_add(self, length: u64) -> Self {
        Self::at(self.value().saturating_add(length))
    }

    /// The last multiple of `unit` bytes that is not after this offset.
    #[inline]
    fn round_down(self, unit: u64) -> Self {
        Self::at(self.value() / unit * unit)
    }

    /// The first multiple of `unit` bytes that is not before this offset.
    #[inline]
    fn round_up(self, unit: u64) -> Self {
        Self::at(self.value().next_multiple_of(unit))
    }
}

impl Offset for GuestOffset {
    #[inline]
    fn at(bytes: u64) -> Self {
        Self(bytes)
    }

    #[inline]
    fn value(self) -> u64 {
        self.0
    }
}

impl Offset for HostOffset {
    #[inline]
    fn at(bytes: u64) -> Self {
        Self(bytes)
    }

    #[inline]
    fn value(self) -> u64 {
        self.0
    }
}

/// The range from `start` to `end`, which is not before `start`.
#[inline]
pub(crate) fn span(start: impl Into<GuestOffset>, end: impl Into<GuestOffset>) -> GuestRange {
    GuestRange::between(start.into(), end.into()).unwrap_or_default()
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
    fn offsets_are_moved_by_lengths_and_rounded_to_units() {
        let offset = HostOffset::new(4608);
        assert_eq!((offset + 512, offset - HostOffset::new(4096)), (HostOffset::new(5120), 512));
        assert_eq!((offset.round_down(4096).bytes(), offset.round_up(4096).bytes()), (4096, 8192));
        assert_eq!(GuestOffset::new(4096).round_up(4096).bytes(), 4096);
        assert_eq!(GuestOffset::new(u64::MAX).saturating_add(1).bytes(), u64::MAX);
    }

    #[test]
    fn the_intersection_of_ranges_that_do_not_touch_is_empty() {
        assert_eq!(range(0, 10).intersection(range(5, 10)), range(5, 5));
        assert_eq!(range(3, 4).intersection(range(100, 10)), range(3, 0));
    }
}
