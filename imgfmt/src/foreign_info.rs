//! What images of other programs' formats say of themselves.

use std::ffi::OsString;

use crate::backup::Uuid;

/// What an image of one of these formats says of itself, besides the size of its disk.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FormatDetails {
    /// VDI.
    Vdi(VdiInfo),
    /// VHD.
    Vpc(VpcInfo),
    /// VHDX.
    Vhdx(VhdxInfo),
    /// VMDK.
    Vmdk(VmdkInfo),
}

/// How an image stores its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageKind {
    /// Every block has its place from the start.
    Fixed,
    /// Blocks get their places when they are first written to.
    Dynamic,
    /// The same, and what was never written shows another image.
    Differencing,
}

impl ImageKind {
    /// Returns its name: `fixed`, `dynamic` or `differencing`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fixed => "fixed",
            Self::Dynamic => "dynamic",
            Self::Differencing => "differencing",
        }
    }
}

/// What a VDI says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VdiInfo {
    /// `Fixed` or `Dynamic`.
    pub kind: ImageKind,
    /// How many blocks the file has.
    pub allocated_blocks: u32,
}

/// What a VHD says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VpcInfo {
    /// The type.
    pub kind: ImageKind,
    /// The geometry: cylinders, heads, and sectors of a track.
    pub geometry: (u16, u8, u8),
    /// Size of the disk in the footer, in bytes. The disk is smaller where the program that made
    /// the image goes by the geometry.
    pub current_size: u64,
    /// The program that made the image, as four characters such as `win ` and `qem2`.
    pub creator: [u8; 4],
    /// The identifier, if it is not zero.
    pub uuid: Option<Uuid>,
}

/// What a VHDX says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VhdxInfo {
    /// The type.
    pub kind: ImageKind,
    /// Size of a sector as the guest sees it, in bytes: 512 or 4096.
    pub logical_sector_size: u64,
    /// Whether the log has changes of the metadata, which are replayed in memory whenever the image
    /// is opened: the program that wrote it did not close it.
    pub log_is_in_use: bool,
    /// Size of the log in bytes.
    pub log_size: u64,
}

/// What a VMDK says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmdkInfo {
    /// The subformat, such as `monolithicSparse`, if the descriptor says it.
    pub create_type: Option<String>,
    /// The content identifier, which changes when the disk does.
    pub cid: Option<u32>,
    /// That of the image below; `u32::MAX` is none.
    pub parent_cid: Option<u32>,
    /// The parts of the disk, in order.
    pub extents: Vec<VmdkExtent>,
}

/// A part of the disk of a VMDK.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmdkExtent {
    /// The name of its file in the descriptor; `None` if it is in the image's own file, or zeroes.
    pub file: Option<OsString>,
    /// Its type: `FLAT`, `SPARSE`, `ZERO`, `VMFS`, `VMFSSPARSE` or `SESPARSE`.
    pub kind: &'static str,
    /// Its length in bytes.
    pub size: u64,
    /// Size of a grain in bytes, if it is sparse and its file was opened.
    pub grain_size: Option<u64>,
    /// Whether its grains are compressed.
    pub is_compressed: bool,
}
