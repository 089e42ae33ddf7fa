//! Archives of machines: the bytes are those of a tar whose sums are right, or of the descriptor in
//! one.

use std::sync::Arc;

use imgfmt::storage::MemoryStorage;
use imgfmt::{ErrorKind, Storage, disk_in_archive};

const BLOCK: usize = 512;
const DISKS: [&str; 2] = ["disk.vmdk", "a b.vhd"];

/// A member with a header of POSIX.
fn member(kind: u8, name: &str, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    bytes[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    bytes[156] = kind;
    bytes[257..265].copy_from_slice(b"ustar\x0000");
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes
}

/// Sets the sums of what can be headers: few changes leave one as it is.
fn seal(bytes: &mut [u8]) {
    let (blocks, _) = bytes.as_chunks_mut::<BLOCK>();
    for block in blocks.iter_mut().filter(|block| block[257..].starts_with(b"ustar")) {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }
}

fn look(bytes: &[u8], wanted: Option<&str>) {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(bytes));
    match disk_in_archive(&storage, wanted.map(str::as_bytes)) {
        Ok(disk) => assert!(disk.start <= disk.end && disk.end <= bytes.len() as u64, "{disk:?}"),
        Err(error) => {
            let known = [ErrorKind::InvalidFormat, ErrorKind::Unsupported, ErrorKind::NotFound];
            assert!(known.contains(&error.kind()), "{error}");
            assert!(!error.to_string().contains(|c: char| c.is_control()), "{error}");
        }
    }
}

pub(crate) fn tar(data: &[u8]) {
    if data.len() > super::foreign::LENGTH_MAX {
        return;
    }
    let mut bytes = data.to_vec();
    seal(&mut bytes);
    for wanted in [None, Some("2"), Some(DISKS[0])] {
        look(&bytes, wanted);
    }
}

pub(crate) fn ovf(data: &[u8]) {
    let mut bytes = member(b'0', "machine.ovf", data);
    for name in DISKS {
        bytes.extend(member(b'0', name, name.as_bytes()));
    }
    seal(&mut bytes);
    for wanted in [None, Some("2")] {
        look(&bytes, wanted);
    }
}

/// Archives of all kinds of members, and descriptors.
pub(crate) fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let descriptor = br#"<?xml version="1.0"?><!-- a machine --><Envelope xmlns:ovf="x"><References>
        <File ovf:id="one" ovf:href="disk.vmdk" ovf:size="9"/><File ovf:id='two' ovf:href="a%20b.v&#104;d"
        /></References><DiskSection><Disk ovf:diskId="d" ovf:fileRef="two"/><Disk ovf:fileRef="one"/>
        <Disk ovf:fileRef="one" ovf:parentRef="d"/></DiskSection><![CDATA[<File]]></Envelope>"#;
    let other = br#"<File id="one" href="disk.vmdk" compression="gzip"/><Disk fileRef="one"/>"#;
    let sealed = |members: &[Vec<u8>]| {
        let mut bytes = [members.concat(), vec![0; 2 * BLOCK]].concat();
        seal(&mut bytes);
        bytes
    };
    let disks = DISKS.map(|name| member(b'0', name, name.as_bytes()));
    let posix = sealed(&[
        member(b'5', "machine/", b""),
        member(b'g', "global", b"12 comment=\n"),
        member(b'x', "list", b"18 path=disk.vmdk\n9 size=9\n"),
        member(b'0', "short", b"disk.vmdk"),
        member(b'x', "list", b"22 GNU.sparse.major=1\n26 GNU.sparse.name=a b.vhd\n"),
        member(b'0', "GNUSparseFile.0/a", b"1\n0\n7\n"),
    ]);
    let mut sparse = member(b'S', "disk.vmdk", b"");
    sparse[257..265].copy_from_slice(b"ustar  \0");
    sparse[482] = 1;
    sparse.resize(3 * BLOCK, 0);
    sparse[BLOCK + 504] = 1;
    let gnu = sealed(&[member(b'L', "././@LongLink", b"a b.vhd\0"), disks[1].clone(), sparse]);
    let machine = [&[member(b'0', "machine.ovf", descriptor)], &disks[..]].concat();
    vec![
        ("tar", "machine", sealed(&machine)),
        ("tar", "posix", posix),
        ("tar", "gnu", gnu),
        ("ovf", "machine", descriptor.to_vec()),
        ("ovf", "compressed", other.to_vec()),
    ]
}
