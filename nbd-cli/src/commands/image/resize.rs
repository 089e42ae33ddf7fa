//! `nbd-cli image resize`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use imgfmt::Shrink;
use nbd_jobs::size::ByteSize;

use super::info::print_json;
use super::open::OpenArgs;
use crate::error::{CommandError, Outcome};
use crate::file_path::FilePathParser;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image resize disk.qcow2 40G
  nbd-cli image resize disk.qcow2 +10G
  nbd-cli image resize --shrink disk.qcow2 -- -10G

Added space reads as zero. Shrink file systems and partitions inside the disk before you shrink it.";

/// Arguments of `nbd-cli image resize`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ResizeArgs {
    /// The image.
    #[arg(value_parser = FilePathParser)]
    pub path: PathBuf,

    /// The new size, or a change after + or -.
    #[arg(allow_hyphen_values = true)]
    pub size: SizeChange,

    /// Allow the disk to shrink: the data at its end is lost.
    #[arg(long)]
    pub shrink: bool,

    /// Print the changed image, like `nbd-cli image info --json`.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub open: OpenArgs,
}

/// A size, or a change of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeChange {
    /// This size.
    To(u64),
    /// This many bytes more.
    Grow(u64),
    /// This many bytes less.
    Shrink(u64),
}

impl FromStr for SizeChange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes = |text: &str| text.parse().map(ByteSize::bytes);
        match (text.strip_prefix('+'), text.strip_prefix('-')) {
            (Some(size), _) => bytes(size).map(Self::Grow),
            (_, Some(size)) => bytes(size).map(Self::Shrink),
            (None, None) => bytes(text).map(Self::To),
        }
    }
}

impl SizeChange {
    /// Returns the resulting size, if it is valid.
    fn apply(self, present: u64) -> Option<u64> {
        match self {
            Self::To(size) => Some(size),
            Self::Grow(bytes) => present.checked_add(bytes).filter(|size| *size <= i64::MAX as u64),
            Self::Shrink(bytes) => present.checked_sub(bytes),
        }
    }
}

pub(crate) fn run(args: &ResizeArgs) -> Result<Outcome, CommandError> {
    let mut image = args.open.change(&args.path)?;
    let (name, present) = (args.path.display(), image.size());
    let Some(size) = args.size.apply(present) else {
        return Err(CommandError::new(format!(
            "cannot resize '{name}': it has {present} bytes, and the resulting size would be invalid"
        )));
    };
    if size < present && !args.shrink {
        return Err(CommandError::new(format!(
            "cannot resize '{name}': it has {present} bytes, and everything beyond {size} would be \
             lost; add --shrink if that is what you want"
        )));
    }
    let shrink = if args.shrink { Shrink::Allow } else { Shrink::Refuse };
    image.resize(size, shrink)?;
    let format = image.format();
    image.close()?;
    if args.json {
        print_json(&args.path, &args.open.options().format(format))?;
    }
    Ok(Outcome::Success)
}

#[cfg(test)]
mod tests {
    use super::SizeChange::{self, Grow, Shrink, To};

    #[test]
    fn a_sign_makes_it_a_change() {
        for (text, change) in [("1M", To(1 << 20)), ("+1K", Grow(1024)), ("-2b", Shrink(2))] {
            assert_eq!(text.parse(), Ok(change));
        }
        for text in ["", "+", "-", "+-1", "1-", "++1"] {
            assert!(text.parse::<SizeChange>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_change_never_leaves_the_range_of_sizes() {
        assert_eq!(Grow(1).apply(i64::MAX as u64), None);
        assert_eq!(Shrink(2).apply(1), None);
        assert_eq!(Shrink(1).apply(1), Some(0));
    }
}
