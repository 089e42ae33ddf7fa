//! Feature bits that the rest of the header contradicts: who opens such an image, what a check
//! says, and what a repair does. QEMU is the judge of the first.

use std::path::Path;
use std::process::Command;

use imgfmt::{Access, Amendment, Format, Image, LazyRefcounts, OpenOptions, Repair};

use crate::common::{at, qemu, text};

const INCOMPATIBLE: usize = 72;
const AUTOCLEAR: usize = 88;
const DATA_FILE: u64 = 1 << 2;
const BITMAPS: u64 = 1;
const RAW: u64 = 2;
const UNKNOWN: u64 = 1 << 40;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    /// An image that stands alone.
    Plain,
    Overlay,
    /// Its data lies in a raw data file.
    DataFile,
}

struct Case {
    name: &'static str,
    base: Base,
    /// Bits set and cleared: the offset of the field, set, cleared.
    change: (usize, u64, u64),
    /// We open it, and QEMU does.
    opens: (bool, bool),
    /// The check calls it damaged.
    is_damaged: bool,
    /// A repair leaves nothing to complain about.
    is_repaired: bool,
}

const CASES: [Case; 8] = [
    Case {
        name: "a raw data file, and no data file",
        base: Base::Plain,
        change: (AUTOCLEAR, RAW, 0),
        opens: (false, false),
        is_damaged: true,
        is_repaired: true,
    },
    Case {
        name: "a raw data file, and a backing file",
        base: Base::Overlay,
        change: (AUTOCLEAR, RAW, 0),
        opens: (false, false),
        is_damaged: true,
        is_repaired: true,
    },
    Case {
        name: "a raw data file with a name, and data that lies here",
        base: Base::DataFile,
        change: (INCOMPATIBLE, 0, DATA_FILE),
        opens: (false, false),
        is_damaged: true,
        is_repaired: false,
    },
    Case {
        name: "a data file without a name",
        base: Base::Plain,
        change: (INCOMPATIBLE, DATA_FILE, 0),
        opens: (false, false),
        is_damaged: true,
        is_repaired: false,
    },
    Case {
        name: "bitmaps, and no extension that says where",
        base: Base::Plain,
        change: (AUTOCLEAR, BITMAPS, 0),
        opens: (true, true),
        is_damaged: true,
        is_repaired: true,
    },
    Case {
        name: "an unknown autoclear bit",
        base: Base::Plain,
        change: (AUTOCLEAR, UNKNOWN, 0),
        opens: (true, true),
        is_damaged: false,
        is_repaired: true,
    },
    Case {
        name: "another compression without a type",
        base: Base::Plain,
        change: (INCOMPATIBLE, 1 << 3, 0),
        opens: (false, false),
        is_damaged: true,
        is_repaired: false,
    },
    Case {
        name: "a sound image with a data file",
        base: Base::DataFile,
        change: (AUTOCLEAR, 0, 0),
        opens: (true, true),
        is_damaged: false,
        is_repaired: true,
    },
];

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn make(directory: &Path, base: Base) -> Vec<u8> {
    let path = directory.join("base.qcow2");
    let below = directory.join("below.raw");
    std::fs::write(&below, vec![0xbb; 1 << 20]).unwrap();
    let data = format!("data_file={},data_file_raw=on", text(&directory.join("data.raw")));
    match base {
        Base::Plain => qemu::create(&path, "cluster_size=4096", "1M"),
        Base::Overlay => qemu::create_overlay(&path, "cluster_size=4096", &below, "raw", "1M"),
        Base::DataFile => qemu::create(&path, &data, "1M"),
    }
    qemu::io(&path, "qcow2", &["write -P 7 8192 16384".to_owned()]);
    std::fs::read(&path).unwrap()
}

fn changed(sound: &[u8], (field, set, clear): (usize, u64, u64)) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    let new = word(&bytes, field) & !clear | set;
    bytes[field..field + 8].copy_from_slice(&new.to_be_bytes());
    bytes
}

fn options(access: Access) -> OpenOptions {
    OpenOptions::new().format(Format::Qcow2).access(access)
}

fn qemu_opens(path: &Path, arguments: &[&str]) -> bool {
    let mut command = Command::new("qemu-io");
    let output = command.args(arguments).args(["-f", "qcow2", "-c", "read 0 512"]).arg(path);
    output.output().unwrap().status.success()
}

/// Whether a check ends with an image that nothing is wrong with, and whether it found anything.
fn check(path: &Path, repair: Repair) -> (bool, bool) {
    match Image::check_file(path, &options(Access::ReadOnly), repair) {
        Ok(report) => {
            let found = report.corruptions + report.corruptions_repaired > 0;
            (report.corruptions + report.leaks == 0, found)
        }
        Err(_) => (false, true),
    }
}

#[test]
fn contradicting_features_are_reported_and_repaired_where_that_loses_nothing() {
    if !qemu::has_qemu() {
        return;
    }
    for case in &CASES {
        let (directory, name) = (tempfile::tempdir().unwrap(), case.name);
        let path = directory.path().join("disk.qcow2");
        let sound = make(directory.path(), case.base);
        std::fs::write(&path, &sound).unwrap();
        let content = qemu::content(&path, "qcow2");
        let damaged = changed(&sound, case.change);
        for access in [Access::ReadOnly, Access::ReadWrite] {
            std::fs::write(&path, &damaged).unwrap();
            let arguments: &[&str] = if access == Access::ReadOnly { &["-r"] } else { &[] };
            assert_eq!(qemu_opens(&path, arguments), case.opens.1, "{name}: QEMU");
            std::fs::write(&path, &damaged).unwrap();
            let opened = Image::open(&path, &options(access));
            assert_eq!(opened.is_ok(), case.opens.0, "{name}: {access:?}");
            drop(opened);
        }
        std::fs::write(&path, &damaged).unwrap();
        assert_eq!(check(&path, Repair::None).1, case.is_damaged, "{name}");
        if case.is_damaged {
            check(&path, Repair::Leaks);
            assert!(std::fs::read(&path).unwrap() == damaged, "{name}: -r leaks has written");
        }
        let (is_sound, found) = check(&path, Repair::All);
        assert_eq!((is_sound, found), (case.is_repaired, case.is_damaged), "{name}");
        if !case.is_repaired {
            assert!(std::fs::read(&path).unwrap() == damaged, "{name}: -r all has written");
            continue;
        }
        assert_eq!(check(&path, Repair::All), (true, false), "{name}: a second repair");
        assert!(qemu::content(&path, "qcow2") == content, "{name}: the disk has changed");
        let disk = Image::open(&path, &options(Access::ReadWrite)).unwrap();
        let mut bytes = vec![0; 1 << 20];
        disk.read_at(at(0), &mut bytes).unwrap();
        assert!(bytes == content, "{name}: we read another disk");
        disk.close().unwrap();
        let expected = word(&sound, AUTOCLEAR);
        assert_eq!(word(&std::fs::read(&path).unwrap(), AUTOCLEAR), expected, "{name}");
    }
}

#[test]
fn a_data_file_that_the_header_names_but_does_not_use_is_not_ignored() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let sound = make(directory.path(), Base::DataFile);
    // QEMU opens this one, and shows whatever lies in the clusters of this file.
    let damaged = changed(&changed(&sound, (INCOMPATIBLE, 0, DATA_FILE)), (AUTOCLEAR, 0, RAW));
    std::fs::write(&path, &damaged).unwrap();
    let error = Image::open(&path, &options(Access::ReadOnly)).unwrap_err();
    assert!(error.to_string().contains("names a data file"), "{error}");
    assert_eq!(check(&path, Repair::All), (false, true));
    assert!(std::fs::read(&path).unwrap() == damaged);
}

#[test]
fn a_raw_data_file_and_a_backing_file_are_told_apart_by_a_repair() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let below = directory.path().join("below.raw");
    std::fs::write(&below, vec![0xbb; 1 << 20]).unwrap();
    let data = format!("data_file={}", text(&directory.path().join("data.raw")));
    qemu::create_overlay(&path, &data, &below, "raw", "1M");
    let content = qemu::content(&path, "qcow2");
    let sound = std::fs::read(&path).unwrap();
    std::fs::write(&path, changed(&sound, (AUTOCLEAR, RAW, 0))).unwrap();
    assert!(Image::open(&path, &options(Access::ReadOnly)).is_ok());
    assert!(qemu_opens(&path, &["-r"]), "QEMU refuses it by now");
    assert_eq!(check(&path, Repair::All), (true, true));
    assert!(qemu::content(&path, "qcow2") == content);
    assert_eq!(word(&std::fs::read(&path).unwrap(), AUTOCLEAR), 0);
}

#[test]
fn who_writes_the_header_keeps_no_bit_that_is_unknown_or_false() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let below = directory.path().join("below.raw");
    let damaged = changed(&make(directory.path(), Base::Plain), (AUTOCLEAR, BITMAPS | UNKNOWN, 0));
    let bits = |what: &str, write: &dyn Fn()| {
        std::fs::write(&path, &damaged).unwrap();
        write();
        assert_eq!(word(&std::fs::read(&path).unwrap(), AUTOCLEAR), 0, "{what}");
    };
    bits("opened for writing", &|| {
        Image::open(&path, &options(Access::ReadWrite)).unwrap().close().unwrap();
    });
    bits("repaired", &|| {
        assert_eq!(check(&path, Repair::All), (true, true));
    });
    bits("another backing file", &|| {
        Image::change_backing_file(
            &path,
            &options(Access::ReadOnly),
            Some((text(&below).as_ref(), Format::Raw)),
        )
        .unwrap();
    });
    bits("amended", &|| {
        let mut amendment = Amendment::default();
        amendment.lazy_refcounts = Some(LazyRefcounts::On);
        Image::amend(&path, &options(Access::ReadOnly), &amendment).unwrap();
    });
}
