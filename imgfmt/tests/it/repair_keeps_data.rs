//! A repair, and opening a damaged image for writing, never change what could be read before:
//! every metadata pointer is aimed at every kind of cluster, and whatever was readable, by our
//! engine and by QEMU's, stays as it was.

use std::path::{Path, PathBuf};
use std::process::Command;

use imgfmt::{
    Access, CreateOptions, Durability, Format, Image, L2Entries, OpenOptions, Qcow2Version,
    Recording, Repair, Speed, ZeroMode,
};

use crate::common::{Random, at, qemu, range};
use crate::structure::{DIRTY, Structure, aim};

fn options() -> OpenOptions {
    OpenOptions::new().format(Format::Qcow2)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Usual,
    Version2,
    Subclusters,
    WideRefcounts,
}

/// A disk of two L2 tables with everything in it that an image can have.
fn make(path: &Path, kind: Kind) -> Vec<u8> {
    let mut create = CreateOptions::new(Format::Qcow2, 96 * 1024);
    create.cluster_size = 512;
    match kind {
        Kind::Usual => {}
        Kind::Version2 => create.version = Qcow2Version::V2,
        Kind::WideRefcounts => create.refcount_bits = 64,
        Kind::Subclusters => {
            create.l2_entries = L2Entries::Extended;
            create.cluster_size = 16 << 10;
            create.size = Some(1028 * (16 << 10));
        }
    }
    let cluster = create.cluster_size;
    let _ = std::fs::remove_file(path);
    let mut disk = Image::create(path, &create).unwrap();
    let write = |disk: &Image, number: u64, fill: u8| {
        disk.write_at(at(number * cluster), &vec![fill; cluster as usize], Durability::Cached)
            .unwrap();
    };
    let far = disk.size() / cluster - 4;
    for number in [0, 1, 2, 5, 37, far] {
        write(&disk, number, 0x51);
    }
    disk.write_compressed(at(8 * cluster), &vec![0x53; cluster as usize]).unwrap();
    disk.create_snapshot("s").unwrap();
    for number in [1, 6] {
        write(&disk, number, 0x54);
    }
    let zeroes = |number| {
        let mode = ZeroMode::KeepAllocated;
        let range = range(number * cluster, cluster);
        disk.write_zeroes(range, mode, Speed::Any, Durability::Cached).unwrap();
    };
    (kind != Kind::Version2).then(|| zeroes(2));
    disk.close().unwrap();
    if kind != Kind::Version2 {
        let disk = Image::open(path, &options().access(Access::ReadWrite)).unwrap();
        disk.add_bitmap("b", 512, Recording::Enabled).unwrap();
        write(&disk, 6, 0x55);
        disk.close().unwrap();
    }
    std::fs::read(path).unwrap()
}

/// What our engine can read, piece by piece; nothing where it cannot.
fn readable(path: &Path, snapshot: Option<&str>) -> Vec<Option<Vec<u8>>> {
    let options = match snapshot {
        None => options(),
        Some(name) => options().snapshot(name),
    };
    let Ok(disk) = Image::open(path, &options) else { return Vec::new() };
    let piece = if disk.size() > 1 << 20 { 16 << 10 } else { 512 };
    // In between a large disk is empty.
    let is_used = |offset: &u64| *offset < 1 << 20 || disk.size() - offset < 1 << 17;
    let pieces = (0..disk.size()).step_by(piece as usize).filter(is_used);
    let read = |offset: u64| {
        let mut bytes = vec![0; piece.min(disk.size() - offset) as usize];
        disk.read_at(at(offset), &mut bytes).ok().map(|()| bytes)
    };
    pieces.map(read).collect()
}

/// What QEMU can read; zeroes where it cannot. Nothing if it does not open the image.
fn salvaged(path: &Path) -> Option<Vec<u8>> {
    let raw = path.with_extension("raw");
    let _ = std::fs::remove_file(&raw);
    let convert = ["convert", "--salvage", "-U", "-f", "qcow2", "-O", "raw"];
    let output = Command::new("qemu-img").args(convert).args([path, &*raw]).output().unwrap();
    output.status.success().then(|| std::fs::read(&raw).unwrap())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    RepairLeaks,
    RepairAll,
    /// Opens the image for writing, which says that it was not closed.
    OpenDirty,
}

const DEEDS: [Deed; 3] = [Deed::RepairLeaks, Deed::RepairAll, Deed::OpenDirty];

fn carry_out(deed: Deed, path: &Path) {
    match deed {
        Deed::RepairLeaks => drop(Image::check_file(path, &options(), Repair::Leaks)),
        Deed::RepairAll => drop(Image::check_file(path, &options(), Repair::All)),
        Deed::OpenDirty => {
            let disk = Image::open(path, &options().access(Access::ReadWrite));
            drop(disk.map(Image::close));
        }
    }
}

/// What could be read before.
struct Before {
    ours: Vec<Option<Vec<u8>>>,
    snapshot: Vec<Option<Vec<u8>>>,
    theirs: Option<Vec<u8>>,
}

impl Before {
    fn of(path: &Path, asks_qemu: bool) -> Self {
        Self {
            ours: readable(path, None),
            snapshot: readable(path, Some("s")),
            theirs: if asks_qemu { salvaged(path) } else { None },
        }
    }

    fn differs(&self, path: &Path) -> Option<String> {
        for (what, name, before) in
            [("the disk", None, &self.ours), ("the snapshot", Some("s"), &self.snapshot)]
        {
            let after = readable(path, name);
            for (index, piece) in before.iter().enumerate().filter(|(_, piece)| piece.is_some()) {
                if after.get(index) != Some(piece) {
                    return Some(format!("{what} differs in piece {index}"));
                }
            }
        }
        let before = self.theirs.as_ref()?;
        let Some(after) = salvaged(path) else {
            return Some("QEMU cannot open it any more".into());
        };
        let differs = before.iter().zip(&after).position(|(a, b)| a != b);
        differs.map(|at| format!("QEMU reads other bytes, the first at {at}"))
    }
}

/// Aims every pointer (or one in some) at everything, carries out all deeds, and lists what went
/// wrong.
fn try_all(kind: Kind, one_in: u64) -> (u64, Vec<String>) {
    let directory = tempfile::tempdir().unwrap();
    let path: PathBuf = directory.path().join("disk.qcow2");
    let sound = make(&path, kind);
    let structure = Structure::of(&sound);
    let has_qemu = qemu::has_qemu();
    let mut random = Random::new("repair keeps data");
    let (mut count, mut wrong) = (0, Vec::new());
    for pointer in &structure.pointers {
        for (target, offset) in &structure.clusters {
            let damaged = aim(&sound, pointer, *offset);
            if damaged == sound || random.below(one_in) != 0 {
                continue;
            }
            let asks_qemu = has_qemu && random.below(10) == 0;
            std::fs::write(&path, &damaged).unwrap();
            let before = Before::of(&path, asks_qemu);
            for deed in DEEDS {
                let mut bytes = damaged.clone();
                if deed == Deed::OpenDirty {
                    if kind == Kind::Version2 {
                        continue;
                    }
                    bytes[79] |= DIRTY;
                }
                std::fs::write(&path, &bytes).unwrap();
                carry_out(deed, &path);
                count += 1;
                if let Some(what) = before.differs(&path) {
                    wrong.push(format!(
                        "{kind:?}, {} -> {target} ({offset:#x}), {deed:?}: {what}",
                        pointer.name
                    ));
                }
            }
        }
    }
    println!("{kind:?}: {count} deeds, {} wrong", wrong.len());
    (count, wrong)
}

fn check(kind: Kind, one_in: u64) {
    let (count, wrong) = try_all(kind, one_in);
    assert!(count > 20, "only {count} cases");
    assert!(wrong.is_empty(), "{} of {count} went wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn no_pointer_that_lies_costs_readable_data() {
    check(Kind::Usual, 1);
}

#[test]
fn no_pointer_that_lies_costs_readable_data_in_version_2() {
    check(Kind::Version2, 1);
}

#[test]
fn no_pointer_that_lies_costs_readable_data_with_subclusters() {
    check(Kind::Subclusters, 10);
}

#[test]
fn no_pointer_that_lies_costs_readable_data_with_wide_refcounts() {
    check(Kind::WideRefcounts, 4);
}
