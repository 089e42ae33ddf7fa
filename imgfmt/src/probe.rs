//! Finding an image's format by its first bytes.
//!
//! The first bytes of a raw disk belong to the guest. A guest that writes a qcow2 header there turns
//! its disk, at the next open by probing, into an image that names any file of the host as its
//! backing file (CVE-2008-2004). Therefore [`Image`](crate::Image) refuses writes to the first
//! sector of a raw image *found by probing* that would make it look like anything else.

use crate::options::Format;

/// How many bytes from the start decide on the format.
pub(crate) const PROBE_LENGTH: usize = 512;

const QCOW_MAGIC: &[u8] = b"QFI\xfb";

/// Formats we do not read but must not mistake for raw: they can name other files too.
const FOREIGN: [(&[u8], &str); 6] = [
    (b"QED\0", "QED"),
    (b"KDMV", "VMDK"),
    (b"COWD", "VMDK"),
    (b"# Disk DescriptorFile", "VMDK"),
    (b"vhdxfile", "VHDX"),
    (b"conectix", "VHD"),
];

/// What the first bytes of a file look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Probed {
    /// A format of this crate.
    Known(Format),
    /// Another image format, of this name.
    Foreign(&'static str),
}

/// Looks at the first bytes of a file, which may be fewer than [`PROBE_LENGTH`].
pub(crate) fn probe(start: &[u8]) -> Probed {
    if start.starts_with(QCOW_MAGIC) {
        return match start.get(4..8) {
            Some([0, 0, 0, 1]) => Probed::Foreign("QCOW version 1"),
            _ => Probed::Known(Format::Qcow2),
        };
    }
    match FOREIGN.iter().find(|(magic, _)| start.starts_with(magic)) {
        Some((_, name)) => Probed::Foreign(name),
        None => Probed::Known(Format::Raw),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_by_their_magic() {
        assert_eq!(probe(b"QFI\xfb\0\0\0\x03"), Probed::Known(Format::Qcow2));
        assert_eq!(probe(b"QFI\xfb\0\0\0\x01"), Probed::Foreign("QCOW version 1"));
        assert_eq!(probe(b"QFI\xfb"), Probed::Known(Format::Qcow2));
        assert_eq!(probe(b"QFI"), Probed::Known(Format::Raw));
        assert_eq!(probe(b"KDMV...."), Probed::Foreign("VMDK"));
        assert_eq!(probe(b""), Probed::Known(Format::Raw));
    }
}
