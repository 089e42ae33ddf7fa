//! Disks in OVA archives are read where they are, in the order that the descriptor gives; what lies
//! in an archive is refused.

use std::path::{Path, PathBuf};

use imgfmt::{
    Access, CacheMode, CreateOptions, Durability, ErrorKind, FileNames, Format, Image, OpenOptions,
    OpenPolicy, Repair, Subformat, VhdSize,
};

use crate::common::{self, Random, at, run, text};

const LONG: &str = "a disk whose name is longer than the hundred bytes that the header of a tar archive \
                    has for names, so that it is elsewhere.vmdk";

/// Makes the files of a machine: two disks, which begin with their numbers, and the descriptor.
fn machine(directory: &Path) {
    for (number, name, format) in [(1_u8, LONG, Format::Vmdk), (2, "second.vhd", Format::Vpc)] {
        let mut create = CreateOptions::new(format, 3 << 20);
        create.open.cache = CacheMode::Unsafe;
        create.foreign.vhd_size = VhdSize::Exact;
        if format == Format::Vmdk {
            create.foreign.subformat = Subformat::StreamOptimized;
        }
        let image = Image::create(directory.join(name), &create).unwrap();
        image.write_at(at(0), &[number; 65536], Durability::Cached).unwrap();
        image.close().unwrap();
    }
    let descriptor = format!(
        "<Envelope><References><File ovf:id=\"a\" ovf:href=\"second.vhd\"/>\
         <File ovf:id=\"b\" ovf:href=\"{LONG}\"/></References><DiskSection>\
         <Disk ovf:fileRef=\"b\"/><Disk ovf:fileRef=\"a\"/></DiskSection></Envelope>"
    );
    std::fs::write(directory.join("machine.ovf"), descriptor).unwrap();
}

fn pack(directory: &Path, name: &str, options: &[&str], members: &[&str]) -> PathBuf {
    let path = directory.join(name);
    let all = [&["-C", text(directory), "-cf", text(&path)], options, members].concat();
    run("tar", &all);
    path
}

/// The number that the disk begins with.
fn disk(path: &Path) -> u8 {
    let image = Image::open(path, &OpenOptions::new()).unwrap();
    let info = Image::inspect_file(path, &OpenOptions::new()).unwrap();
    assert_eq!((image.size(), info.size, info.format), (3 << 20, 3 << 20, image.format()));
    let mut found = vec![0; 65537];
    image.read_at(at(0), &mut found).unwrap();
    assert!(found[..65536].iter().all(|byte| *byte == found[0]) && found[65536] == 0);
    found[0]
}

fn refused(path: &Path) -> imgfmt::Error {
    Image::open(path, &OpenOptions::new()).unwrap_err()
}

fn member(archive: &Path, wanted: &str) -> PathBuf {
    format!("{}:{wanted}", archive.display()).into()
}

#[test]
fn disks_are_found_by_number_and_by_name() {
    if !common::has_tool("tar") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    machine(here);
    let members = ["machine.ovf", "second.vhd", LONG];
    for format in ["--format=gnu", "--format=pax", "--format=ustar"] {
        // That format has no place for it.
        let members = if format == "--format=ustar" { &members[..2] } else { &members[..] };
        let archive = pack(here, &format!("{format}.ova"), &[format], members);
        assert_eq!(disk(&member(&archive, "second.vhd")), 2, "{format}");
        if members.len() == 3 {
            assert_eq!(disk(&archive), 1, "{format}: the first of the descriptor");
            assert_eq!(disk(&member(&archive, "1")), 1, "{format}");
            assert_eq!(disk(&member(&archive, "2")), 2, "{format}");
            assert_eq!(disk(&member(&archive, LONG)), 1, "{format}");
        } else {
            let error = refused(&archive);
            assert!(error.to_string().contains("does not contain"), "{error}");
        }
        for wanted in ["3", "0", "nosuch.vmdk", "99999999999999999999999"] {
            assert_eq!(refused(&member(&archive, wanted)).kind(), ErrorKind::NotFound, "{wanted}");
        }
    }
    // Without a descriptor, in the order of the archive.
    let archive = pack(here, "bare.OVA", &["--format=gnu"], &["./second.vhd", LONG]);
    assert_eq!((disk(&archive), disk(&member(&archive, "2"))), (2, 1));
    assert_eq!(disk(&member(&archive, "second.vhd")), 2);
}

#[test]
fn an_archive_is_only_read_and_a_raw_disk_if_the_user_says_so() {
    if !common::has_tool("tar") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    machine(here);
    let archive = pack(here, "machine.ova", &[], &["machine.ovf", "second.vhd", LONG]);
    let write = OpenOptions::new().access(Access::ReadWrite);
    for path in [archive.clone(), member(&archive, "2")] {
        assert_eq!(Image::open(&path, &write).unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    let raw = Image::open(&archive, &OpenOptions::new().format(Format::Raw)).unwrap();
    assert_eq!(raw.size(), std::fs::metadata(&archive).unwrap().len());
    // The name alone does not make it an archive, and a file of the whole name comes first.
    let plain = here.join("plain.ova");
    std::fs::write(&plain, [7; 4096]).unwrap();
    assert_eq!(Image::open(&plain, &OpenOptions::new()).unwrap().size(), 4096);
    assert!(refused(&member(&plain, "1")).to_string().contains("not an archive"));
    std::fs::write(member(&archive, "2"), [7; 512]).unwrap();
    assert_eq!(Image::open(member(&archive, "2"), &OpenOptions::new()).unwrap().size(), 512);
}

#[test]
fn an_image_in_an_archive_names_no_other_file() {
    if !common::has_tool("tar") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    machine(here);
    std::fs::write(here.join("secret.img"), [7; 65536]).unwrap();
    let overlay = CreateOptions::overlay("secret.img", Format::Raw);
    Image::create(here.join("top.qcow2"), &overlay).unwrap();
    let archive = pack(here, "guest.ova", &[], &["top.qcow2", "second.vhd"]);
    let trusting = OpenOptions::new().policy(OpenPolicy::any_file().allow_format_probe());
    for path in [archive.clone(), member(&archive, "top.qcow2")] {
        let opened = [
            Image::open(&path, &trusting).map(|_| ()),
            Image::inspect_chain(&path, &trusting).map(|_| ()),
        ];
        for opened in opened {
            let error = opened.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PolicyDenied, "{error}");
            assert!(error.to_string().contains("stand alone"), "{error}");
        }
    }
    // As for QEMU, the file itself is a raw disk.
    let mut members = OpenOptions::new();
    members.names = FileNames::AsInQemu;
    assert_eq!(Image::open(&archive, &members).unwrap().format(), Format::Raw);
    assert_eq!(Image::open(member(&archive, "2"), &members).unwrap().format(), Format::Vpc);
}

#[test]
fn an_image_in_an_archive_is_checked_and_not_repaired() {
    if !common::has_tool("tar") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    Image::create(here.join("a.qcow2"), &CreateOptions::new(Format::Qcow2, 1 << 20)).unwrap();
    let archive = pack(here, "a.ova", &[], &["a.qcow2"]);
    for path in [archive.clone(), member(&archive, "1")] {
        let report = Image::check_file(&path, &OpenOptions::new(), Repair::None).unwrap();
        assert_eq!((report.leaks, report.corruptions), (0, 0));
        let error = Image::check_file(&path, &OpenOptions::new(), Repair::All).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
        // Its file is the archive.
        let image = Image::open(&path, &OpenOptions::new()).unwrap();
        let files: Vec<_> = image.files().into_iter().map(|(path, _)| path).collect();
        assert_eq!((files, image.other_layers().len()), (vec![archive.clone()], 0));
    }
}

#[test]
fn a_disk_in_an_archive_is_not_below_an_image() {
    let directory = tempfile::tempdir().unwrap();
    let mut overlay = CreateOptions::overlay("a.ova:1", Format::Raw);
    overlay.size = Some(1 << 20);
    let error = Image::create(directory.path().join("top.qcow2"), &overlay).unwrap_err();
    assert!(error.to_string().contains("convert it to a file"), "{error}");
}

/// Appends a member to an archive.
fn append(archive: &mut Vec<u8>, (name, kind): (&str, u8), extents: usize, content: &[u8]) {
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar  \0");
    header[482] = u8::from(extents > 4);
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    archive.extend_from_slice(&header);
    let blocks = extents.saturating_sub(4).div_ceil(21);
    for block in 0..blocks {
        let mut extension = [0; 512];
        extension[504] = u8::from(block + 1 < blocks);
        archive.extend_from_slice(&extension);
    }
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(512), 0);
}

#[test]
fn members_behind_a_file_with_many_holes_are_found_where_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("holes.ova");
    for extents in [4, 5, 25, 26, 100] {
        // What looks like a member is within the content of the first one.
        let mut inner = Vec::new();
        append(&mut inner, ("wanted.img", b'0'), 0, &[9; 512]);
        let mut archive = Vec::new();
        append(&mut archive, ("holes.img", b'S'), extents, &inner);
        append(&mut archive, ("wanted.img", b'0'), 0, &[7; 512]);
        std::fs::write(&path, &archive).unwrap();
        let image = Image::open(member(&path, "wanted.img"), &OpenOptions::new()).unwrap();
        let mut found = [0; 512];
        image.read_at(at(0), &mut found).unwrap();
        assert_eq!(found, [7; 512], "{extents}");
        // The blocks are cut off.
        archive.truncate(512);
        std::fs::write(&path, &archive).unwrap();
        assert_eq!(refused(&member(&path, "1")).kind(), ErrorKind::InvalidFormat, "{extents}");
    }
}

#[test]
fn two_files_of_a_name_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("twice.ova");
    let mut archive = Vec::new();
    for (name, byte) in [("a.img", 1), ("b.img", 2), ("./a.img", 3)] {
        append(&mut archive, (name, b'0'), 0, &[byte; 512]);
    }
    std::fs::write(&path, &archive).unwrap();
    for wanted in [path.clone(), member(&path, "a.img"), member(&path, "3")] {
        let error = refused(&wanted);
        assert_eq!(error.kind(), ErrorKind::InvalidFormat, "{error}");
        assert!(error.to_string().contains("several"), "{error}");
    }
    assert!(Image::open(member(&path, "b.img"), &OpenOptions::new()).is_ok());
}

#[test]
fn names_are_found_as_other_programs_write_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("names.ova");
    let descriptor = "<Envelope><File id='a' href='my%20disk&#46;img'/><File id='b' href='100%25'/>\
                      <File id='c' href='delta.img'/><Disk diskId='one' fileRef='a'/>\
                      <Disk fileRef='b'/><Disk fileRef='c' parentRef='one'/></Envelope>";
    let mut archive = Vec::new();
    append(&mut archive, ("._m.ovf", b'0'), 0, &[0xff; 163]);
    append(&mut archive, ("m.ovf", b'0'), 0, descriptor.as_bytes());
    for (name, byte) in [("my disk.img", 1), ("100%", 2), ("100%25", 3), ("delta.img", 4)] {
        append(&mut archive, (name, b'0'), 0, &[byte; 512]);
    }
    std::fs::write(&path, &archive).unwrap();
    for (wanted, byte) in [("1", 1), ("2", 3)] {
        let mut found = [0; 512];
        let image = Image::open(member(&path, wanted), &OpenOptions::new()).unwrap();
        image.read_at(at(0), &mut found).unwrap();
        assert_eq!(found, [byte; 512], "{wanted}: as it is first, then decoded");
    }
    // It is only the differences to another one, whatever it is called by.
    for wanted in ["3", "delta.img", "./delta.img"] {
        let error = refused(&member(&path, wanted));
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{wanted}");
        assert!(error.to_string().contains("only the differences"), "{error}");
    }
    let mut found = [0; 512];
    let image = Image::open(member(&path, "100%"), &OpenOptions::new()).unwrap();
    image.read_at(at(0), &mut found).unwrap();
    assert_eq!(found, [2; 512]);
    // A descriptor that makes no sense does not keep files from being read by their names.
    let mut archive = Vec::new();
    append(&mut archive, ("m.ovf", b'0'), 0, b"<Disk fileRef='nosuch'/>");
    append(&mut archive, ("delta.img", b'0'), 0, &[4; 512]);
    std::fs::write(&path, &archive).unwrap();
    assert_eq!(refused(&path).kind(), ErrorKind::InvalidFormat);
    assert!(Image::open(member(&path, "delta.img"), &OpenOptions::new()).is_ok());
}

#[test]
fn a_sparse_member_is_refused_and_others_are_read() {
    if !common::has_tool("tar") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    machine(here);
    let holes = std::fs::File::create(here.join("holes.img")).unwrap();
    holes.set_len(1 << 20).unwrap();
    for format in ["--format=gnu", "--format=pax"] {
        let name = format!("{format}.ova");
        let archive = pack(here, &name, &["-S", format], &["holes.img", "second.vhd"]);
        let error = refused(&archive);
        assert!(error.to_string().contains("holes left out"), "{format}: {error}");
    }
}

#[test]
fn damaged_archives_are_refused_or_read_as_far_as_they_are_sound() {
    if !common::has_tool("tar") {
        return;
    }
    let mut random = Random::new("archives");
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    machine(here);
    let archive = pack(here, "whole.ova", &["--format=pax"], &["machine.ovf", "second.vhd", LONG]);
    let whole = std::fs::read(&archive).unwrap();
    let path = here.join("damaged.ova");
    for round in 0..300 {
        let mut bytes = whole.clone();
        if round % 3 == 0 {
            bytes.truncate(random.below(whole.len() as u64) as usize);
        }
        for _ in 0..random.below(8) {
            let place = random.below(bytes.len().clamp(1, 8192) as u64) as usize;
            if let Some(byte) = bytes.get_mut(place) {
                *byte = random.next() as u8;
            }
        }
        std::fs::write(&path, &bytes).unwrap();
        for wanted in [path.clone(), member(&path, "2"), member(&path, "second.vhd")] {
            // It may be open; it ends, and does not panic.
            if let Ok(image) = Image::open(&wanted, &OpenOptions::new()) {
                let _ = image.read_at(at(0), &mut vec![0; image.size().min(65536) as usize]);
            }
        }
    }
}
