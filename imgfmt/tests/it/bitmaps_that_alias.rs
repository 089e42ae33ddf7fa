//! Bitmaps whose directory, table or bits lie in clusters that are something else as well: whatever
//! is done with them, no byte of the disk or of a snapshot changes that was readable before and was
//! not written.

use std::path::Path;
use std::process::Command;

use crate::common::{Random, at, qemu};
use crate::structure::{Pointer, Structure, aim};
use imgfmt::{
    Access, BitmapChange, CacheMode, CreateOptions, Durability, Format, Image, L2Entries,
    OpenOptions, Recording, Repair, Shrink,
};

/// Guest clusters that are written while bitmaps are in the way: new ones, and one that has data.
const WRITTEN: [u64; 9] = [6, 20, 21, 22, 23, 24, 25, 26, 27];

fn options(access: Access) -> OpenOptions {
    OpenOptions::new().format(Format::Qcow2).access(access).cache(CacheMode::Unsafe)
}

fn write(disk: &Image, number: u64, cluster: u64, fill: u8) {
    let bytes = vec![fill; cluster as usize];
    // A damaged image may refuse it.
    let _ = disk.write_at(at(number * cluster), &bytes, Durability::Cached);
}

/// A disk with data, compressed data, a snapshot, and two bitmaps with bits, one of which is
/// disabled.
fn make(path: &Path, cluster: u64, l2_entries: L2Entries) -> Vec<u8> {
    let mut create = CreateOptions::new(Format::Qcow2, 192 * cluster);
    create.cluster_size = cluster;
    create.l2_entries = l2_entries;
    let _ = std::fs::remove_file(path);
    create.open = options(Access::ReadWrite);
    let mut disk = Image::create(path, &create).unwrap();
    for number in [0, 1, 2, 5, 37, 150] {
        write(&disk, number, cluster, 0x51);
    }
    disk.write_compressed(at(8 * cluster), &vec![0x53; cluster as usize]).unwrap();
    disk.create_snapshot("s").unwrap();
    disk.add_bitmap("b", cluster, Recording::Enabled).unwrap();
    disk.add_bitmap("d", cluster, Recording::Enabled).unwrap();
    for number in [1, 6, 9] {
        write(&disk, number, cluster, 0x54);
    }
    disk.bitmap_transaction(&[BitmapChange::Disable { name: "d".into() }]).unwrap();
    disk.close().unwrap();
    std::fs::read(path).unwrap()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    /// Writes, which the bitmap notes, and closes, which stores it.
    Store,
    Clear,
    Remove,
    RemoveAll,
    Disable,
    Enable,
    Merge,
    Freeze,
    MarkAll,
    Add,
    Grow,
    Apply,
    Repair,
}

const DEEDS: [Deed; 13] = [
    Deed::Store,
    Deed::Clear,
    Deed::Remove,
    Deed::RemoveAll,
    Deed::Disable,
    Deed::Enable,
    Deed::Merge,
    Deed::Freeze,
    Deed::MarkAll,
    Deed::Add,
    Deed::Grow,
    Deed::Apply,
    Deed::Repair,
];

impl Deed {
    fn changes(self) -> Vec<BitmapChange> {
        let (b, d) = (|| "b".to_owned(), || "d".to_owned());
        let granularity = 512;
        match self {
            Self::Store | Self::Grow | Self::Apply | Self::Repair => vec![],
            Self::Clear => vec![BitmapChange::Clear { name: b() }],
            Self::Remove => vec![BitmapChange::Remove { name: b() }],
            Self::RemoveAll => {
                vec![BitmapChange::Remove { name: b() }, BitmapChange::Remove { name: d() }]
            }
            Self::Disable => vec![BitmapChange::Disable { name: b() }],
            Self::Enable => vec![BitmapChange::Enable { name: d() }],
            Self::Merge => vec![BitmapChange::Merge { into: b(), from: d() }],
            Self::Freeze => vec![BitmapChange::Freeze { name: b(), backup: None }],
            Self::MarkAll => vec![BitmapChange::MarkAll { name: d() }],
            Self::Add => {
                let recording = Recording::Enabled;
                vec![BitmapChange::Add { name: "new".into(), granularity, recording }]
            }
        }
    }

    /// Opens the image, does it between writes, and opens it again for other writes, which take
    /// what has become free. What is refused is refused.
    fn carry_out(self, path: &Path, cluster: u64) {
        if self == Self::Repair {
            drop(Image::check_file(path, &options(Access::ReadOnly), Repair::All));
        }
        for (round, numbers) in [&WRITTEN[..3], &WRITTEN[3..6], &WRITTEN[6..]].iter().enumerate() {
            let Ok(mut disk) = Image::open(path, &options(Access::ReadWrite)) else { return };
            // The disabled bitmap is read too.
            let _ = disk.bitmaps();
            write(&disk, numbers[0], cluster, 0x61);
            if round == 0 {
                let _ = disk.bitmap_transaction(&self.changes());
                match self {
                    Self::Grow => drop(disk.resize(disk.size() + 64 * cluster, Shrink::Refuse)),
                    Self::Apply => drop(disk.apply_snapshot("s")),
                    _ => {}
                }
            }
            numbers[1..].iter().for_each(|number| write(&disk, *number, cluster, 0x62));
            let _ = disk.close();
        }
    }
}

/// What can be read, cluster by cluster; nothing where it cannot.
fn readable(path: &Path, cluster: u64, snapshot: Option<&str>) -> Vec<Option<Vec<u8>>> {
    let options = match snapshot {
        None => options(Access::ReadOnly),
        Some(name) => options(Access::ReadOnly).snapshot(name),
    };
    let Ok(disk) = Image::open(path, &options) else { return Vec::new() };
    let read = |number: u64| {
        let mut bytes = vec![0; cluster as usize];
        disk.read_at(at(number * cluster), &mut bytes).ok().map(|()| bytes)
    };
    (0..192).map(read).collect()
}

fn changed(
    before: &[Option<Vec<u8>>],
    after: &[Option<Vec<u8>>],
    written: &[u64],
) -> Option<usize> {
    let differs = |(number, piece): &(usize, &Option<Vec<u8>>)| {
        piece.is_some()
            && !written.contains(&(*number as u64))
            && after.get(*number) != Some(*piece)
    };
    before.iter().enumerate().find(differs).map(|(number, _)| number)
}

/// Whether QEMU, if it opens the image, reads the same disk but for what was written.
fn qemu_reads(path: &Path, cluster: u64, before: &[Option<Vec<u8>>]) -> bool {
    let raw = path.with_extension("raw");
    let convert = ["convert", "-U", "-f", "qcow2", "-O", "raw"];
    let output = Command::new("qemu-img").args(convert).args([path, &*raw]).output().unwrap();
    if !output.status.success() {
        return true;
    }
    let bytes = std::fs::read(&raw).unwrap();
    let pieces = bytes.chunks(cluster as usize).map(|piece| Some(piece.to_vec()));
    changed(before, &pieces.collect::<Vec<_>>(), &WRITTEN).is_none()
}

struct Trials {
    cluster: u64,
    random: Random,
    count: u64,
    wrong: Vec<String>,
}

impl Trials {
    fn try_deed(&mut self, path: &Path, damaged: &[u8], deed: Deed, what: &str) {
        std::fs::write(path, damaged).unwrap();
        let before = readable(path, self.cluster, None);
        let snapshot = readable(path, self.cluster, Some("s"));
        deed.carry_out(path, self.cluster);
        self.count += 1;
        let expected = if deed == Deed::Apply { &snapshot } else { &before };
        let after = readable(path, self.cluster, None);
        // Applying a snapshot may have been refused.
        let differs = changed(expected, &after, &WRITTEN)
            .filter(|_| deed != Deed::Apply || changed(&before, &after, &WRITTEN).is_some());
        if let Some(number) = differs {
            self.wrong.push(format!("{what}, {deed:?}: cluster {number} of the disk has changed"));
        }
        if let Some(number) = changed(&snapshot, &readable(path, self.cluster, Some("s")), &[]) {
            self.wrong
                .push(format!("{what}, {deed:?}: cluster {number} of the snapshot has changed"));
        }
        let asks_qemu = deed != Deed::Apply && self.random.below(20) == 0 && qemu::has_qemu();
        if asks_qemu && !qemu_reads(path, self.cluster, &before) {
            self.wrong.push(format!("{what}, {deed:?}: QEMU reads another disk"));
        }
    }
}

fn try_all(cluster: u64, l2_entries: L2Entries, one_in: u64) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let sound = make(&path, cluster, l2_entries);
    let structure = Structure::of(&sound);
    let pointers: Vec<&Pointer> =
        structure.pointers.iter().filter(|pointer| pointer.name.contains("bitmap")).collect();
    assert!(pointers.len() >= 5, "{pointers:?}");
    let random = Random::new("bitmaps that alias");
    let mut trials = Trials { cluster, random, count: 0, wrong: Vec::new() };
    for deed in DEEDS {
        trials.try_deed(&path, &sound, deed, "a sound image");
    }
    for pointer in &pointers {
        for (target, offset) in &structure.clusters {
            for deed in DEEDS {
                if trials.random.below(one_in) != 0 {
                    continue;
                }
                let mut damaged = aim(&sound, pointer, *offset);
                let mut what = format!("{} -> {target} ({offset:#x})", pointer.name);
                // Sometimes two pointers lie.
                if trials.random.below(4) == 0 {
                    let other = pointers[trials.random.below(pointers.len() as u64) as usize];
                    let number = trials.random.below(structure.clusters.len() as u64) as usize;
                    let (target, offset) = &structure.clusters[number];
                    damaged = aim(&damaged, other, *offset);
                    what = format!("{what} and {} -> {target} ({offset:#x})", other.name);
                }
                trials.try_deed(&path, &damaged, deed, &what);
            }
        }
    }
    let Trials { count, wrong, .. } = trials;
    println!("clusters of {cluster}: {count} trials, {} wrong", wrong.len());
    assert!(count > 100, "only {count} trials");
    assert!(wrong.is_empty(), "{} of {count} went wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn no_bitmap_that_lies_costs_readable_data() {
    try_all(512, L2Entries::Standard, 1);
}

#[test]
fn no_bitmap_that_lies_costs_readable_data_with_subclusters() {
    try_all(16 << 10, L2Entries::Extended, 6);
}
