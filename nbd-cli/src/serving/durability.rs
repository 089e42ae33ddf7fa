//! Values of `--bitmap-durability`.

use clap::ValueEnum;

/// The failures that recording dirty bitmaps survive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum BitmapDurability {
    /// Power failure, and everything below.
    #[default]
    Power,
    /// A crash of the server.
    Process,
    /// Only a clean shutdown, as with QEMU.
    None,
}

impl From<BitmapDurability> for imgfmt::BitmapDurability {
    fn from(durability: BitmapDurability) -> Self {
        match durability {
            BitmapDurability::Power => Self::PowerLoss,
            BitmapDurability::Process => Self::ProcessDeath,
            BitmapDurability::None => Self::CleanClose,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_that_of_the_library() {
        assert_eq!(
            imgfmt::BitmapDurability::from(BitmapDurability::default()),
            imgfmt::BitmapDurability::default()
        );
    }
}
