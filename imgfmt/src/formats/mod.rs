//! Formats of other programs: images of them are read, and new ones of some of them made.
//!
//! A format is a folder here and a line in [`TABLE`]. It tells what a part of the disk is
//! ([`Blocks`]), and everything else follows from that: reads, maps, extents, chains. The headers
//! and tables of these formats are untrusted; what is read of them at once is bounded, and each
//! number is checked where it is used.
//!
//! A new image is [planned](Planned), which refuses what is not possible before there is a file,
//! and then filled. It cannot be opened for writing again.

mod block_table;
mod blocks;
mod decoded;
mod file;
mod foreign;
mod in_order;
mod new;
mod new_blocks;
mod parallels;
mod qcow;
mod qed;
mod vdi;
mod vhdx;
mod vmdk;
mod vpc;

pub(crate) use self::foreign::{ForeignImage, Identity, Opening, Parent};
pub(crate) use self::in_order::DiskInOrder;
pub(crate) use self::new::{Extents, InOrder, NewForeign, NewParent, OTHER_FORMATS, Planned};
pub(crate) use self::vhdx::replay_log;
use crate::error::Result;
use crate::format::Format;

/// A format that is read.
pub(crate) struct Entry {
    pub(crate) format: Format,
    /// Whether a file is one that begins with these bytes, 512 unless it is shorter.
    pub(crate) starts: fn(&[u8]) -> bool,
    /// The header at the end of a file, where it may be.
    pub(crate) end: Option<HeaderAtEnd>,
    pub(crate) open: fn(Opening<'_>) -> Result<Box<dyn ForeignImage>>,
    /// Plans a new image, where that is possible.
    pub(crate) plan: Option<fn(&NewForeign<'_>) -> Result<Planned>>,
}

/// A header at the end of a file, which counts only if the file is called so.
pub(crate) struct HeaderAtEnd {
    /// The endings of names; no other format has them.
    pub(crate) names: &'static [&'static str],
    /// Whether a file is one that ends with these 512 bytes and has this length.
    pub(crate) is_one: fn(&[u8; 512], u64) -> bool,
}

/// All formats that are read besides raw and qcow2.
pub(crate) const TABLE: &[Entry] = &[
    Entry {
        format: Format::Vdi,
        starts: vdi::starts,
        end: None,
        open: vdi::open,
        plan: Some(vdi::plan),
    },
    Entry {
        format: Format::Vhdx,
        starts: vhdx::starts,
        end: None,
        open: vhdx::open,
        plan: Some(vhdx::plan),
    },
    Entry {
        format: Format::Vmdk,
        starts: vmdk::starts,
        end: None,
        open: vmdk::open,
        plan: Some(vmdk::plan),
    },
    Entry {
        format: Format::Vpc,
        starts: vpc::starts,
        end: Some(HeaderAtEnd { names: &["vhd", "vpc"], is_one: vpc::ends }),
        open: vpc::open,
        plan: Some(vpc::plan),
    },
    Entry { format: Format::Qed, starts: qed::starts, end: None, open: qed::open, plan: None },
    Entry { format: Format::Qcow, starts: qcow::starts, end: None, open: qcow::open, plan: None },
    Entry {
        format: Format::Parallels,
        starts: parallels::starts,
        end: None,
        open: parallels::open,
        plan: None,
    },
];

/// The format's line in the table, if it is read.
pub(crate) fn entry(format: Format) -> Option<&'static Entry> {
    TABLE.iter().find(|entry| entry.format == format)
}

impl Format {
    /// Returns whether new images of this format can be made.
    pub fn can_be_made(self) -> bool {
        self.is_writable() || entry(self).is_some_and(|entry| entry.plan.is_some())
    }

    /// Returns whether images of this format can be opened, or only detected.
    pub fn is_supported(self) -> bool {
        self.is_writable() || entry(self).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_that_is_read_has_one_line() {
        for entry in TABLE {
            let lines = TABLE.iter().filter(|other| other.format == entry.format).count();
            assert_eq!(lines, 1, "{}", entry.format);
            assert!(entry.format.is_supported() && !entry.format.is_writable());
        }
    }
}
