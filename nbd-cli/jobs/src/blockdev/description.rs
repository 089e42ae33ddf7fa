//! The description of a disk.

use std::path::PathBuf;
use std::time::Duration;

use imgfmt::Format;
use nbd_proto::NbdUri;
use nbd_server::export::filters::Window;

use crate::qemu_name::{self, DriverSettings};

/// A disk described by options.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskDescription {
    /// Its storage.
    pub source: DiskSource,
    /// The part of the storage that contains the image, by drivers `raw` below its format.
    pub storage_window: Window,
    /// The format of the image; `None`: to be detected.
    pub format: Option<Format>,
    /// Its backing file.
    pub backing: DescribedBacking,
    /// The part of the disk that is exported, by drivers `raw` above its format.
    pub window: Window,
    /// Whether there are drivers `raw` above its format.
    pub is_below_raw: bool,
    /// How it is used.
    pub settings: DriverSettings,
}

/// The backing file of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DescribedBacking {
    /// The one that the image names.
    #[default]
    AsNamed,
    /// None.
    Ignored,
    /// This one. It is read-only, regardless of its options.
    Given(Box<DiskDescription>),
}

/// The storage of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiskSource {
    /// A file.
    File(PathBuf),
    /// The file that the image above names; only for backing files.
    NamedAbove,
    /// An export of another server.
    Export(Box<NbdUri>),
    /// No storage: reads return zeroes, and writes are discarded.
    Null {
        /// Size in bytes.
        size: u64,
        /// Duration of each request.
        latency: Duration,
    },
}

/// Size of a disk of the drivers `null-co` and `null-aio`, in bytes.
pub(super) const NULL_SIZE: u64 = 1 << 30;

impl Default for DiskSource {
    fn default() -> Self {
        Self::File(PathBuf::new())
    }
}

impl DiskSource {
    /// Parses the name of a file.
    ///
    /// # Errors
    ///
    /// A sentence if its scheme is unknown.
    pub(super) fn named(text: &str) -> Result<Self, String> {
        if qemu_name::is_name_of_server(text) {
            return Ok(Self::Export(Box::new(qemu_name::from_name(text)?)));
        }
        match text.split_once(':') {
            Some(("file", path)) => Ok(Self::File(path.into())),
            Some(("null-co" | "null-aio", "//")) => {
                Ok(Self::Null { size: NULL_SIZE, latency: Duration::ZERO })
            }
            Some((driver @ ("null-co" | "null-aio"), _)) => {
                Err(format!("The only allowed filename for this driver is '{driver}://'"))
            }
            // As in QEMU, a colon in a name needs a slash before it.
            Some((scheme, _)) if !scheme.contains('/') => {
                Err(format!("Unknown protocol '{scheme}'; write ./{text} for a file"))
            }
            _ => Ok(Self::File(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use imgfmt::CacheMode;

    use crate::key_values::KeyValues;

    #[test]
    fn cache_switches_are_stronger_than_the_cache_mode() {
        let mode = |text: &str, mode| {
            DiskDescription::from_options(KeyValues::parse(text, None).unwrap())
                .unwrap()
                .settings
                .cache
                .applied_to(mode)
        };
        let plain = "driver=raw,file.filename=d";
        for cache in CacheMode::ALL {
            assert_eq!(mode(plain, cache), cache);
        }
        let direct = "driver=raw,cache.direct=on,file.filename=d";
        assert_eq!(mode(direct, CacheMode::Writeback), CacheMode::None);
        assert_eq!(mode(direct, CacheMode::Writethrough), CacheMode::DirectSync);
        let overridden = "driver=raw,cache.direct=on,file.filename=d,file.cache.direct=off";
        assert_eq!(mode(overridden, CacheMode::None), CacheMode::Writeback);
        let no_flush = "driver=qcow2,cache.no-flush=on,file.filename=d";
        assert_eq!(mode(no_flush, CacheMode::Writeback), CacheMode::Unsafe);
        assert_eq!(mode(no_flush, CacheMode::None), CacheMode::None);
        let flush = "driver=qcow2,file.cache.no-flush=off,file.filename=d";
        assert_eq!(mode(flush, CacheMode::Unsafe), CacheMode::Writeback);
    }
}
