//! The image formats, by the names that QEMU's tools use.

use std::fmt;

/// The format in which a file stores a virtual disk.
///
/// [`Raw`](Self::Raw), [`Qcow2`](Self::Qcow2) and, with the feature `encryption`,
/// [`Luks`](Self::Luks) can be read and written, some others can be [read](Self::is_supported) or
/// [made](Self::can_be_made) as well. The rest is recognised, so that their containers are not
/// mistaken for raw disks, and refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// The file is the disk, byte for byte.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// The first version of QEMU's copy-on-write format.
    Qcow,
    /// QEMU enhanced disk.
    Qed,
    /// VMware: sparse extents and descriptor files.
    Vmdk,
    /// VirtualBox.
    Vdi,
    /// Virtual PC and Hyper-V: VHD, fixed, dynamic and differencing.
    Vpc,
    /// Hyper-V: VHDX.
    Vhdx,
    /// Parallels Desktop.
    Parallels,
    /// A disk encrypted with LUKS, versions 1 and 2.
    Luks,
    /// Apple's disk images.
    Dmg,
    /// Compressed loop devices.
    Cloop,
    /// Growing images of Bochs.
    Bochs,
}

/// Format, name and, for people, the product it comes from.
const NAMES: [(Format, &str, &str); 13] = [
    (Format::Raw, "raw", "raw"),
    (Format::Qcow2, "qcow2", "qcow2"),
    (Format::Qcow, "qcow", "qcow (QEMU's first copy-on-write format)"),
    (Format::Qed, "qed", "QED (QEMU enhanced disk)"),
    (Format::Vmdk, "vmdk", "VMDK (VMware)"),
    (Format::Vdi, "vdi", "VDI (VirtualBox)"),
    (Format::Vpc, "vpc", "VHD (Virtual PC, Hyper-V)"),
    (Format::Vhdx, "vhdx", "VHDX (Hyper-V)"),
    (Format::Parallels, "parallels", "Parallels"),
    (Format::Luks, "luks", "LUKS (encrypted)"),
    (Format::Dmg, "dmg", "DMG (Apple)"),
    (Format::Cloop, "cloop", "cloop"),
    (Format::Bochs, "bochs", "Bochs"),
];

impl Format {
    /// Returns the name that QEMU's tools use.
    pub fn name(self) -> &'static str {
        self.entry().1
    }

    /// Returns the common name, with the product.
    pub fn description(self) -> &'static str {
        self.entry().2
    }

    /// Returns the format of that name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        NAMES.iter().find(|entry| entry.1 == name).map(|entry| entry.0)
    }

    /// Returns all formats, in a fixed order.
    pub fn all() -> impl Iterator<Item = Self> {
        NAMES.iter().map(|entry| entry.0)
    }

    /// Returns whether images of this format can be changed.
    pub const fn is_writable(self) -> bool {
        let can_decrypt = cfg!(feature = "encryption");
        matches!(self, Self::Raw | Self::Qcow2) || can_decrypt && matches!(self, Self::Luks)
    }

    fn entry(self) -> &'static (Self, &'static str, &'static str) {
        NAMES.iter().find(|entry| entry.0 == self).unwrap_or(&NAMES[0])
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_is_found_by_its_own_name() {
        for (format, name, _) in NAMES {
            assert_eq!(Format::from_name(name), Some(format));
            assert_eq!(format.name(), name);
        }
        assert_eq!(Format::from_name("vhd"), None);
    }
}
