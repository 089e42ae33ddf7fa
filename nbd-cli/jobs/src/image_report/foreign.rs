//! The properties of images of other programs' formats.

use imgfmt::{FormatDetails, VdiInfo, VhdxInfo, VmdkExtent, VmdkInfo, VpcInfo};
use serde::Serialize;

/// What only images of one of these formats have. Sizes are in bytes.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum ForeignReport {
    /// VDI; not keys of qemu-img.
    Vdi(VdiReport),
    /// VHD; not keys of qemu-img.
    Vpc(VpcReport),
    /// VHDX; not keys of qemu-img.
    Vhdx(VhdxReport),
    /// VMDK, with the keys of qemu-img.
    Vmdk(VmdkReport),
}

/// What only VDIs have.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct VdiReport {
    /// `fixed` or `dynamic`.
    pub subformat: &'static str,
    /// How many blocks the file has.
    pub allocated_blocks: u32,
}

/// What only VHDs have.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct VpcReport {
    /// `fixed`, `dynamic` or `differencing`.
    pub subformat: &'static str,
    /// Cylinders of the geometry.
    pub cylinders: u16,
    /// Its heads.
    pub heads: u8,
    /// Sectors of a track.
    pub sectors: u8,
    /// Size of the disk in the footer.
    pub current_size: u64,
    /// The program that made the image.
    pub creator: String,
    /// The identifier.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
}

/// What only VHDXs have.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct VhdxReport {
    /// `fixed`, `dynamic` or `differencing`.
    pub subformat: &'static str,
    /// Size of a sector as the guest sees it.
    pub logical_sector_size: u64,
    /// Whether the log has changes that have to be replayed.
    pub log_in_use: bool,
    /// Size of the log.
    pub log_size: u64,
}

/// What only VMDKs have.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct VmdkReport {
    /// The subformat, such as `monolithicSparse`.
    pub create_type: String,
    /// The content identifier.
    pub cid: u32,
    /// That of the image below; 4294967295 is none.
    pub parent_cid: u32,
    /// The parts of the disk.
    pub extents: Vec<VmdkExtentReport>,
}

/// A part of the disk of a VMDK.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct VmdkExtentReport {
    /// Its file.
    pub filename: String,
    /// Its type, such as `FLAT`.
    pub format: &'static str,
    /// Its length.
    pub virtual_size: u64,
    /// Size of a grain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// Whether its grains are compressed, if they are.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub compressed: bool,
}

impl ForeignReport {
    /// `name_of` gives the path of a file that the image names, or of its own.
    pub(super) fn new(
        details: &FormatDetails,
        name_of: impl Fn(Option<&std::ffi::OsStr>) -> String,
    ) -> Option<Self> {
        Some(match details {
            FormatDetails::Vdi(vdi) => Self::Vdi(vdi.into()),
            FormatDetails::Vpc(vpc) => Self::Vpc(vpc.into()),
            FormatDetails::Vhdx(vhdx) => Self::Vhdx(vhdx.into()),
            FormatDetails::Vmdk(vmdk) => Self::Vmdk(VmdkReport::new(vmdk, name_of)),
            _ => return None,
        })
    }
}

impl From<&VdiInfo> for VdiReport {
    fn from(vdi: &VdiInfo) -> Self {
        Self { subformat: vdi.kind.name(), allocated_blocks: vdi.allocated_blocks }
    }
}

impl From<&VpcInfo> for VpcReport {
    fn from(vpc: &VpcInfo) -> Self {
        let (cylinders, heads, sectors) = vpc.geometry;
        let creator = String::from_utf8_lossy(&vpc.creator);
        Self {
            subformat: vpc.kind.name(),
            cylinders,
            heads,
            sectors,
            current_size: vpc.current_size,
            creator: creator.trim_end_matches([' ', '\0']).to_owned(),
            uuid: vpc.uuid.map(|uuid| uuid.to_string()),
        }
    }
}

impl From<&VhdxInfo> for VhdxReport {
    fn from(vhdx: &VhdxInfo) -> Self {
        Self {
            subformat: vhdx.kind.name(),
            logical_sector_size: vhdx.logical_sector_size,
            log_in_use: vhdx.log_is_in_use,
            log_size: vhdx.log_size,
        }
    }
}

impl VmdkReport {
    fn new(vmdk: &VmdkInfo, name_of: impl Fn(Option<&std::ffi::OsStr>) -> String) -> Self {
        let extent = |extent: &VmdkExtent| VmdkExtentReport {
            filename: name_of(extent.file.as_deref()),
            format: extent.kind,
            virtual_size: extent.size,
            cluster_size: extent.grain_size,
            compressed: extent.is_compressed,
        };
        Self {
            create_type: vmdk.create_type.clone().unwrap_or_default(),
            cid: vmdk.cid.unwrap_or_default(),
            parent_cid: vmdk.parent_cid.unwrap_or(u32::MAX),
            extents: vmdk.extents.iter().map(extent).collect(),
        }
    }
}
