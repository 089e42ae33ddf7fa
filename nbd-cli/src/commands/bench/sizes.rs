//! Weighted sizes and ranges of a disk, as words of the command line.

use std::str::FromStr;

use nbd_jobs::size::ByteSize;

/// A size with a weight: `4K`, `64K:3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightedSize {
    /// The size.
    pub size: ByteSize,
    /// Its weight among the sizes.
    pub weight: u32,
}

impl FromStr for WeightedSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (size, weight) = text.split_once(':').unwrap_or((text, "1"));
        let weight = weight.parse().ok().filter(|weight| *weight > 0);
        let weight = weight.ok_or_else(|| {
            format!("'{text}' has no weight of at least 1 after the colon, as in 4K:9")
        })?;
        Ok(Self { size: size.parse()?, weight })
    }
}

/// A part of a disk: `1G+256M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskRange {
    /// Its offset, in bytes.
    pub offset: ByteSize,
    /// Its length, in bytes.
    pub length: ByteSize,
}

impl FromStr for DiskRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (offset, length) = text.split_once('+').ok_or_else(|| {
            format!("'{text}' is not a range; give an offset and a length, as in 1G+256M")
        })?;
        let (offset, length) = (offset.parse()?, length.parse::<ByteSize>()?);
        if length.bytes() == 0 {
            return Err(format!("'{text}' is empty; give a length of more than 0"));
        }
        Ok(Self { offset, length })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_weight_1_unless_given() {
        let size = |text: &str| text.parse::<WeightedSize>().map(|it| (it.size.bytes(), it.weight));
        assert_eq!(size("4K"), Ok((4096, 1)));
        assert_eq!(size("64K:9"), Ok((65536, 9)));
        for text in ["4K:0", "4K:", "4K:-1", ":1", "x", "4K:1:1"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ranges_have_an_offset_and_a_length() {
        let range =
            |text: &str| text.parse::<DiskRange>().map(|it| (it.offset.bytes(), it.length.bytes()));
        assert_eq!(range("1G+256M"), Ok((1 << 30, 256 << 20)));
        assert_eq!(range("0+4096"), Ok((0, 4096)));
        for text in ["1G", "1G+0", "+", "1G-2G", "a+b"] {
            assert!(range(text).is_err(), "{text}");
        }
    }
}
