//! How the caches of the system are used for an image.

use std::fmt;

/// The use of the page cache, and the moment at which writes are durable. Names and meanings are
/// QEMU's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CacheMode {
    /// Data goes through the page cache; it is durable after a flush, or when a write with FUA
    /// returns.
    #[default]
    Writeback,
    /// Data bypasses the page cache (O_DIRECT); it is durable after a flush, or when a write with
    /// FUA returns.
    None,
    /// Data goes through the page cache; every change is durable when it returns.
    Writethrough,
    /// Data bypasses the page cache (O_DIRECT); every change is durable when it returns.
    DirectSync,
    /// Data goes through the page cache; flushes and writes with FUA return at once, and a power
    /// cut can destroy the image. Written data survives a crash of the process, but not of the
    /// system. Use it for new images that no other program relies on yet, such as the result of a
    /// conversion.
    Unsafe,
}

impl CacheMode {
    /// All modes.
    pub const ALL: [Self; 5] =
        [Self::Writeback, Self::None, Self::Writethrough, Self::DirectSync, Self::Unsafe];

    /// Returns the mode's name in QEMU and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Writeback => "writeback",
            Self::None => "none",
            Self::Writethrough => "writethrough",
            Self::DirectSync => "directsync",
            Self::Unsafe => "unsafe",
        }
    }

    /// Returns the mode of this name, if there is one.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    /// Returns whether data bypasses the page cache.
    #[must_use]
    pub const fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::DirectSync)
    }

    /// Returns whether every change is durable when it returns.
    #[must_use]
    pub const fn is_writethrough(self) -> bool {
        matches!(self, Self::Writethrough | Self::DirectSync)
    }

    /// Returns whether flushes put data on stable storage.
    #[must_use]
    pub const fn syncs(self) -> bool {
        !matches!(self, Self::Unsafe)
    }
}

impl fmt::Display for CacheMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::CacheMode;

    #[test]
    fn every_mode_is_found_by_its_name() {
        for mode in CacheMode::ALL {
            assert_eq!(CacheMode::from_name(mode.name()), Some(mode));
        }
        assert_eq!(CacheMode::from_name("Writeback"), None);
    }
}
