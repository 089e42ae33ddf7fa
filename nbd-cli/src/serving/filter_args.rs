//! Values of `--discard`, `--detect-zeroes`, `--cache` and `--aio`.

use clap::{Args, ValueEnum};
use nbd_server::export::filters::{self, FilterOptions};

/// Changes of requests in front of an image.
#[derive(Clone, Copy, Debug, Args)]
pub struct FilterArgs {
    /// The treatment of discarded space.
    #[arg(long, value_enum, default_value_t, value_name = "WHAT")]
    pub discard: Discard,

    /// The treatment of writes whose data is all zero.
    #[arg(long, value_enum, default_value_t, value_name = "WHAT")]
    pub detect_zeroes: DetectZeroes,
}

impl FilterArgs {
    /// Returns the options of a filter.
    pub(crate) fn options(self) -> FilterOptions {
        let mut options = FilterOptions::default();
        options.discard = self.discard.into();
        options.detect_zeroes = self.detect_zeroes.into();
        options
    }

    /// Returns whether nothing is changed.
    pub(crate) fn is_default(self) -> bool {
        self.discard == Discard::default() && self.detect_zeroes == DetectZeroes::default()
    }
}

/// The treatment of space that a client has discarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Discard {
    /// It is freed.
    #[default]
    Unmap,
    /// It is kept: discards have no effect.
    Ignore,
}

impl From<Discard> for filters::Discard {
    fn from(value: Discard) -> Self {
        match value {
            Discard::Unmap => Self::Unmap,
            Discard::Ignore => Self::Ignore,
        }
    }
}

/// The use of the page cache for images, and the durability of writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum CacheMode {
    /// Through the page cache; durable after a flush.
    #[default]
    Writeback,
    /// Bypassing the page cache (direct I/O); durable after a flush.
    None,
    /// Through the page cache; every write is durable when it is answered.
    Writethrough,
    /// Bypassing the page cache (direct I/O); every write is durable when it is answered.
    #[value(name = "directsync")]
    DirectSync,
    /// Through the page cache; flushes do nothing, and a power cut can destroy the image.
    Unsafe,
}

impl From<CacheMode> for imgfmt::CacheMode {
    fn from(value: CacheMode) -> Self {
        match value {
            CacheMode::Writeback => Self::Writeback,
            CacheMode::None => Self::None,
            CacheMode::Writethrough => Self::Writethrough,
            CacheMode::DirectSync => Self::DirectSync,
            CacheMode::Unsafe => Self::Unsafe,
        }
    }
}

/// The treatment of written data that is all zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DetectZeroes {
    /// It is written.
    #[default]
    Off,
    /// Zeroes are written in the fastest way; their space stays allocated.
    On,
    /// Zeroes are written by freeing their space where possible.
    Unmap,
}

impl From<DetectZeroes> for filters::DetectZeroes {
    fn from(value: DetectZeroes) -> Self {
        match value {
            DetectZeroes::Off => Self::Off,
            DetectZeroes::On => Self::On,
            DetectZeroes::Unmap => Self::Unmap,
        }
    }
}

/// The way in which reads wait for a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Aio {
    /// With io_uring if the system allows it, otherwise with threads.
    #[default]
    Auto,
    /// With threads.
    Threads,
}

impl Aio {
    /// Whether the server may use io_uring. With the variable `NBD_AIO`, tests disable it.
    pub(crate) fn may_use_io_uring(self) -> bool {
        self == Self::Auto && std::env::var_os("NBD_AIO").is_none_or(|mode| mode != "threads")
    }
}
