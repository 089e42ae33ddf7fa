//! Options of new images of other programs' formats.

use std::ffi::OsString;

/// How a new image of another program's format is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Subformat {
    /// Blocks are added to the file when they are written: VDI, VHD, VHDX and VMDK
    /// (`monolithicSparse`).
    #[default]
    Dynamic,
    /// Every block has its place from the start: VDI, VHD, VHDX and VMDK (`monolithicFlat`), whose
    /// data is in a file of its own.
    Fixed,
    /// Grains are compressed, and the file is written from the start to the end, as OVA archives
    /// need it: VMDK. It is not an image until it is [closed](crate::Image::close): what a flush or
    /// a FUA write has made durable cannot be read before that.
    StreamOptimized,
}

/// The size of the disk of a new VHD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum VhdSize {
    /// As requested, rounded up to whole MiB, which Azure requires.
    #[default]
    WholeMebibytes,
    /// As requested, in whole sectors of 512 bytes.
    Exact,
    /// The next larger size that cylinders, heads and sectors of a track can express, for programs
    /// that go by these. Disks of more than 127 GiB have the requested size.
    Geometry,
}

/// The controller that a VMDK names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum VmdkAdapter {
    /// IDE.
    #[default]
    Ide,
    /// LSI Logic SCSI.
    LsiLogic,
    /// BusLogic SCSI.
    BusLogic,
    /// The controller of old versions of ESX.
    LegacyEsx,
}

/// Options that only formats of other programs have; created by [`Default`], changed field by
/// field.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForeignOptions {
    /// How the image is laid out.
    pub subformat: Subformat,
    /// Whether the data of a VMDK is in files of at most 2 GiB (`twoGbMaxExtentSparse`,
    /// `twoGbMaxExtentFlat`).
    pub split_extents: bool,
    /// Size of the blocks of a VHDX in bytes: a power of two from 1 MiB to 256 MiB. `None` chooses
    /// one by the size of the disk.
    pub block_size: Option<u64>,
    /// Length of the log of a VHDX in bytes, in whole MiB and below 4 GiB. `None` is 1 MiB.
    pub log_size: Option<u64>,
    /// Whether blocks of a VHDX that are not stored are marked as absent, rather than as zero.
    pub absent_blocks: bool,
    /// The size of the disk of a VHD.
    pub vhd_size: VhdSize,
    /// The controller that a VMDK names.
    pub adapter: VmdkAdapter,
    /// The version of the virtual hardware that a VMDK names. `None` is 4.
    pub hardware_version: Option<String>,
    /// The version of the guest's tools that a VMDK names.
    pub tools_version: Option<String>,
    /// Whether other programs may mark grains of a VMDK as zeroed.
    pub zeroed_grains: bool,
    /// The name that the file will have, if it is made under another one: a VMDK contains it. If
    /// that one only has an ending more, the [files with the data](crate::Image::own_files) of a
    /// VMDK get the same ending, and are to be renamed before the file itself.
    pub final_name: Option<OsString>,
}
