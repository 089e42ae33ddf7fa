//! Images of other programs' formats, which are only read: the bytes are those of the file.

use std::sync::Arc;

use imgfmt::storage::MemoryStorage;
use imgfmt::{BackingFile, Format, Image, OpenOptions, OpenPolicy};

use super::{foreign_images, look};

/// Longer files are not looked at.
pub(super) const LENGTH_MAX: usize = 1 << 20;

pub(super) fn foreign(format: Format, data: &[u8]) {
    if data.len() <= LENGTH_MAX {
        open(format, data);
    }
}

/// Opens an image of any length and looks at it.
pub(super) fn open(format: Format, data: &[u8]) {
    let storage = Arc::new(MemoryStorage::from_bytes(data));
    let options =
        OpenOptions::new().format(format).policy(OpenPolicy::deny()).backing(BackingFile::Ignored);
    match Image::from_storage(Arc::clone(&storage) as _, &options) {
        Ok(image) => look(&image),
        Err(error) => assert!(!error.to_string().contains(char::is_control), "{error:?}"),
    }
    let _ = Image::inspect_storage(storage, &options);
}

/// An image of VirtualBox.
pub(crate) fn vdi(data: &[u8]) {
    foreign(Format::Vdi, data);
}

/// An image of Virtual PC or Hyper-V.
pub(crate) fn vpc(data: &[u8]) {
    foreign(Format::Vpc, data);
}

/// A QEMU enhanced disk.
pub(crate) fn qed(data: &[u8]) {
    foreign(Format::Qed, data);
}

/// An image of the first version of qcow.
pub(crate) fn qcow(data: &[u8]) {
    foreign(Format::Qcow, data);
}

/// An image of Parallels.
pub(crate) fn parallels(data: &[u8]) {
    foreign(Format::Parallels, data);
}

/// The seeds of the targets: sound images.
pub(crate) fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let free = u32::MAX;
    vec![
        ("vdi", "dynamic", foreign_images::vdi(1, 10 * 4096 - 512, &[free, 0, 2, 1, free - 1, 3])),
        ("vdi", "fixed", foreign_images::vdi(2, 4 * 4096, &[0, 1, 2, 3])),
        ("vpc", "fixed", foreign_images::vpc_fixed(5 * 4096)),
        (
            "vpc",
            "dynamic",
            foreign_images::Vhd::new(3, 9 * 4096).block(1, &[0xf0]).block(4, &[0xff]).bytes(),
        ),
        (
            "vpc",
            "differencing",
            foreign_images::Vhd::new(4, 9 * 4096).over("base.vhd").block(2, &[0x3c]).bytes(),
        ),
        (
            "qed",
            "plain",
            foreign_images::qed(9 * 4096, &[0, 8192 + 3 * 4096, 1, 8192 + 4 * 4096], None),
        ),
        ("qed", "overlay", foreign_images::qed(3 * 4096, &[8192 + 3 * 4096], Some("base"))),
        ("qcow", "plain", foreign_images::qcow(9 * 512, &[0, 1536, 2048], None)),
        ("qcow", "overlay", foreign_images::qcow(9 * 512, &[1536], Some("base"))),
        (
            "qcow",
            "compressed",
            foreign_images::qcow(9 * 512, &[1536, 1 << 63 | 12 << 54 | 2048], None),
        ),
        (
            "parallels",
            "old",
            foreign_images::parallels(b"WithoutFreeSpace", 6 * 4096, &[0, 8, 24, 16]),
        ),
        (
            "parallels",
            "extended",
            foreign_images::parallels(b"WithouFreSpacExt", 6 * 4096, &[1, 0, 2, 3]),
        ),
    ]
}
