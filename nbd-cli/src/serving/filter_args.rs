//! Values of `--discard` and `--detect-zeroes`.

use clap::ValueEnum;
use nbd_server::export::filters;

/// What becomes of space that a client does not need any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Discard {
    /// It is given back.
    #[default]
    Unmap,
    /// It is kept: discards do nothing.
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

/// What to do with written data that is all zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DetectZeroes {
    /// It is written.
    #[default]
    Off,
    /// The quickest way to make zeroes is taken; space is kept.
    On,
    /// Space is given back where that makes zeroes.
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
