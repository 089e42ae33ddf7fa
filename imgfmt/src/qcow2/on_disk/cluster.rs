//! Numbers of clusters.
//!
//! Clusters of the disk and clusters of the file have separate types, like offsets, and a number is
//! not an offset. [`Geometry`](super::geometry::Geometry) converts between them.

use std::ops::{Add, AddAssign, Sub};

/// The number of a cluster of the file that stores the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HostCluster(u64);

/// The number of a cluster of the virtual disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct GuestCluster(u64);

macro_rules! cluster {
    ($name:ident) => {
        impl $name {
            pub(crate) const fn new(number: u64) -> Self {
                Self(number)
            }

            pub(crate) const fn number(self) -> u64 {
                self.0
            }

            /// The clusters from this one to `end`, which is excluded.
            #[inline]
            pub(crate) fn up_to(self, end: Self) -> impl Iterator<Item = Self> + Clone {
                (self.0..end.0).map(Self)
            }

            /// This cluster and the ones after it, `count` together.
            #[inline]
            pub(crate) fn run(self, count: u64) -> impl Iterator<Item = Self> + Clone {
                self.up_to(self + count)
            }
        }

        impl Add<u64> for $name {
            type Output = Self;

            #[inline]
            fn add(self, count: u64) -> Self {
                Self(self.0 + count)
            }
        }

        impl AddAssign<u64> for $name {
            #[inline]
            fn add_assign(&mut self, count: u64) {
                self.0 += count;
            }
        }

        impl Sub for $name {
            type Output = u64;

            #[inline]
            fn sub(self, first: Self) -> u64 {
                self.0 - first.0
            }
        }
    };
}

cluster!(HostCluster);
cluster!(GuestCluster);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_has_as_many_clusters_as_were_asked_for() {
        let first = HostCluster::new(4);
        let run: Vec<u64> = first.run(3).map(HostCluster::number).collect();
        assert_eq!(run, [4, 5, 6]);
        assert_eq!((first.run(0).count(), HostCluster::new(7) - first), (0, 3));
    }
}
