use super::*;
use crate::storage::MemoryStorage;

fn probe_bytes(bytes: &[u8]) -> Format {
    probe_file("disk.img", bytes)
}

fn probe_file(name: &str, bytes: &[u8]) -> Format {
    let storage = MemoryStorage::from_bytes(bytes);
    Format::probe(&storage, Some(Path::new(name))).unwrap()
}

/// A file of 4 KiB that ends with this.
fn ending_with(end: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 4096 - end.len()];
    bytes.extend_from_slice(end);
    bytes
}

fn vhd_footer(length: usize) -> Vec<u8> {
    let mut footer = vec![0; length];
    footer[..8].copy_from_slice(b"conectix");
    footer[8..16].copy_from_slice(&[0, 0, 0, 2, 0, 1, 0, 0]);
    footer[16..24].fill(0xff);
    // Of the files that end with it here.
    footer[48..56].copy_from_slice(&(4096 - length as u64).to_be_bytes());
    footer[60..64].copy_from_slice(&2_u32.to_be_bytes());
    let sum: u32 = footer.iter().map(|byte| u32::from(*byte)).sum();
    footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
    footer
}

fn dmg_trailer() -> Vec<u8> {
    let mut trailer = vec![0; 512];
    trailer[..12].copy_from_slice(b"koly\0\0\0\x04\0\0\x02\0");
    trailer[32..40].copy_from_slice(&1024_u64.to_be_bytes());
    trailer[216..224].copy_from_slice(&1024_u64.to_be_bytes());
    trailer[224..232].copy_from_slice(&2048_u64.to_be_bytes());
    trailer
}

#[test]
fn formats_are_told_by_their_first_bytes() {
    for (start, format) in [
        (&b"QFI\xfb\0\0\0\x03"[..], Format::Qcow2),
        (b"QFI\xfb\0\0\0\x01", Format::Qcow),
        (b"QFI\xfb", Format::Qcow2),
        (b"QFI", Format::Raw),
        (b"QED\0", Format::Qed),
        (b"KDMV....", Format::Vmdk),
        (b"COWD\x01\0\0\0", Format::Vmdk),
        (b"\xbe\xba\xfe\xca\0\0\0\0\x01\0\0\0\x02\0\0\0", Format::Vmdk),
        (b"\xbe\xba\xfe\xca\0\0\0\0", Format::Raw),
        (b"# disk descriptorfile\r\nversion=1\r\n", Format::Vmdk),
        (b"\n# made by hand\n\nversion=3\nCID=1\n", Format::Vmdk),
        (b"# made by hand\nversion=4\n", Format::Raw),
        (b"vhdxfile", Format::Vhdx),
        (b"conectix", Format::Vpc),
        (b"WithoutFreeSpace\x02\0\0\0", Format::Parallels),
        (b"WithouFreSpacExt\x02\0\0\0", Format::Parallels),
        (b"LUKS\xba\xbe\0\x01aes", Format::Luks),
        (b"LUKS\xba\xbe\0\x02\0\0", Format::Luks),
        (b"LUKS\xba\xbe\0\x03", Format::Raw),
        (b"Bochs Virtual HD Image\0", Format::Bochs),
        (b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount", Format::Cloop),
        (b"#!/bin/sh\n#Version 2 of the Format\n", Format::Raw),
        (b"", Format::Raw),
    ] {
        assert_eq!(probe_bytes(start), format, "{}", start.escape_ascii());
        assert_eq!(probe(start), format, "{}", start.escape_ascii());
    }
    let mut vdi = vec![0; 512];
    vdi[64..68].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
    assert_eq!(probe_bytes(&vdi), Format::Vdi);
    assert_eq!(probe_bytes(&vdi[..66]), Format::Raw);
}

#[test]
fn formats_are_told_by_their_last_bytes_and_their_names() {
    for length in [511, 512] {
        for name in ["disk.vhd", "/srv/disk.VHD", "a.b.vpc", ".Vpc"] {
            let image = ending_with(&vhd_footer(length));
            assert_eq!(probe_file(name, &image), Format::Vpc, "{name}");
        }
    }
    assert_eq!(probe_file("disk.DMG", &ending_with(&dmg_trailer())), Format::Dmg);
}

#[test]
fn a_guest_cannot_make_its_raw_disk_another_image_by_what_it_writes_at_the_end() {
    let disks = [vhd_footer(512), vhd_footer(511), dmg_trailer()].map(|end| ending_with(&end));
    for disk in &disks {
        for name in ["disk.img", "disk.raw", "disk", "vhd", "dmg", "/dev/vhd", "disk.vhd.img", ""] {
            assert_eq!(probe_file(name, disk), Format::Raw, "{name}");
        }
        assert_eq!(Format::probe(&MemoryStorage::from_bytes(disk), None).unwrap(), Format::Raw);
    }
    // Each format has its own names.
    assert_eq!(probe_file("disk.dmg", &disks[0]), Format::Raw);
    assert_eq!(probe_file("disk.vhd", &disks[2]), Format::Raw);
    let (disk, name) = (MemoryStorage::from_bytes(&disks[0]), Some(Path::new("disk.vhd")));
    assert_eq!(probe_named(&disk, name, FileNames::AsInQemu).unwrap(), Format::Raw);
}

#[test]
fn a_disk_is_not_taken_for_an_image_because_its_last_sector_begins_like_one() {
    let vhd = |bytes: &[u8]| probe_file("disk.vhd", bytes);
    assert_eq!(vhd(&ending_with(&[&b"conectix"[..], &[7; 504]].concat())), Format::Raw);
    let dmg = |bytes: &[u8]| probe_file("disk.dmg", bytes);
    assert_eq!(dmg(&ending_with(&[&b"koly"[..], &[0; 508]].concat())), Format::Raw);
    let mut outside = dmg_trailer();
    outside[32..40].copy_from_slice(&4096_u64.to_be_bytes());
    assert_eq!(dmg(&ending_with(&outside)), Format::Raw);
    // One that does not say the length of the file.
    assert_eq!(vhd(&ending_with(&vhd_footer(512))[512..]), Format::Raw);
    // The footer in the middle of a disk is the guest's.
    let mut middle = ending_with(&vhd_footer(512));
    middle.extend_from_slice(&[0; 512]);
    assert_eq!(vhd(&middle), Format::Raw);
}

#[test]
fn a_cd_image_is_a_raw_disk() {
    let mut iso = vec![0; 40960];
    iso[32768..32774].copy_from_slice(b"\x01CD001");
    assert_eq!(probe_bytes(&iso), Format::Raw);
}
