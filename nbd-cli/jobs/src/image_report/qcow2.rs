//! The properties of qcow2 images.

use imgfmt::{
    BitmapEntry, CompressionType, Encryption, L2Entries, Qcow2Info, Qcow2Version, Recording,
};
use serde::Serialize;

use super::encryption::{EncryptionReport, Naming};

/// What only qcow2 images have, with the keys of qemu-img.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Qcow2Report {
    /// The version: `0.10` or `1.1`.
    pub compat: &'static str,
    /// The compression of clusters: `zlib` or `zstd`.
    pub compression_type: &'static str,
    /// Whether refcounts may be out of date while the image is in use.
    pub lazy_refcounts: bool,
    /// Width of a refcount.
    pub refcount_bits: u32,
    /// Whether the image is marked as damaged.
    pub corrupt: bool,
    /// Whether clusters have subclusters.
    pub extended_l2: bool,
    /// Name of the external data file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    /// Whether the external data file is a raw image of the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file_raw: Option<bool>,
    /// The dirty bitmaps in the file.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<BitmapReport>,
    /// The encryption of clusters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encrypt: Option<EncryptionReport>,
}

/// A dirty bitmap in the file.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct BitmapReport {
    /// The name.
    pub name: String,
    /// Bytes of the disk per bit.
    pub granularity: u64,
    /// Those of `in-use` and `auto` that are set.
    pub flags: Vec<&'static str>,
    /// The bitmap to which a checkpoint has moved bits of this one, which is incomplete without
    /// them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frozen: Option<String>,
}

impl Qcow2Report {
    pub(super) fn new(qcow2: &Qcow2Info, encryption: Option<&Encryption>) -> Self {
        let data_file = qcow2.data_file_name.as_deref();
        Self {
            compat: match qcow2.version {
                Qcow2Version::V2 => "0.10",
                Qcow2Version::V3 => "1.1",
            },
            compression_type: match qcow2.compression {
                CompressionType::Zlib => "zlib",
                CompressionType::Zstd => "zstd",
            },
            lazy_refcounts: qcow2.lazy_refcounts,
            refcount_bits: qcow2.refcount_bits,
            corrupt: qcow2.is_corrupt,
            extended_l2: qcow2.l2_entries == L2Entries::Extended,
            data_file: data_file.map(|name| name.to_string_lossy().into_owned()),
            data_file_raw: data_file.is_some().then_some(qcow2.data_file_is_raw),
            bitmaps: qcow2.bitmaps.iter().map(BitmapReport::from).collect(),
            encrypt: encryption.map(|it| EncryptionReport::new(it, Naming::InImage)),
        }
    }
}

impl From<&BitmapEntry> for BitmapReport {
    fn from(bitmap: &BitmapEntry) -> Self {
        let flags = bitmap_flags(bitmap.is_in_use, bitmap.recording);
        let (name, frozen) = (bitmap.name.clone(), bitmap.frozen.clone());
        Self { name, granularity: bitmap.granularity, flags, frozen }
    }
}

/// The flags of a bitmap, with qemu-img's names.
pub(crate) fn bitmap_flags(is_in_use: bool, recording: Recording) -> Vec<&'static str> {
    let flags = [(is_in_use, "in-use"), (recording == Recording::Enabled, "auto")];
    flags.into_iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).collect()
}
