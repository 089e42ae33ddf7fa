//! File systems with damaged bytes.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use imgfmt::storage::MemoryStorage;
use imgfmt::{Durability, Format, HostOffset, Image, OpenOptions, Storage as _};

use super::disk::MountedDisk;
use super::file_system::FileKind;
use super::volume::Volume;
use crate::observer::JobContext;

/// Runs a tool that Debian keeps in a directory for administrators; false if it is missing.
fn made(tool: &str, arguments: &[&str]) -> bool {
    let path = Path::new("/usr/sbin").join(tool);
    if !path.is_file() {
        assert!(std::env::var_os("CI").is_none(), "{tool} is not installed");
        eprintln!("skipped: {tool} is not installed");
        return false;
    }
    let output = Command::new(path).args(arguments).output().expect("it runs");
    assert!(output.status.success(), "{output:?}");
    true
}

fn volume(bytes: &[u8]) -> Option<Volume> {
    let storage = Arc::new(MemoryStorage::new(bytes.len() as u64));
    storage.write_at(HostOffset::new(0), bytes, Durability::Cached).unwrap();
    let image = Image::from_storage(storage, &OpenOptions::new().format(Format::Raw)).unwrap();
    let disk = MountedDisk::new("disk".into(), image, JobContext::default().observer);
    Volume::find(&Arc::new(disk), 0..bytes.len() as u64)
}

/// Asks for everything, up to this many entries: a directory may contain itself.
fn walk(volume: &Volume) -> usize {
    let mut directories = vec![Vec::new()];
    let mut seen = 0;
    while let Some(path) = directories.pop() {
        let Ok(names) = volume.list(&path) else { continue };
        for (name, kind) in names.into_iter().take(100) {
            seen += 1;
            if seen > 200 {
                return seen;
            }
            let child = [&path[..], &name].join(&b'/');
            let child = child.strip_prefix(b"/").unwrap_or(&child).to_vec();
            let _ = volume.info(&child);
            let _ = volume.link(&child);
            let _ = volume.read(&child, 0, 5000);
            let _ = volume.read(&child, 1 << 26, 5000);
            if kind == FileKind::Directory {
                directories.push(child);
            }
        }
    }
    seen
}

/// Damages what is not zero, which is where the structures are.
fn damage(bytes: &[u8], places: &[usize], seed: u64) -> Vec<u8> {
    let mut damaged = bytes.to_vec();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..1 + seed % 40 {
        let at = places[(random() % places.len() as u64) as usize];
        damaged[at] = [0, 1, 0x7f, 0xff, random() as u8][(random() % 5) as usize];
    }
    damaged
}

fn survives(bytes: &[u8], least: usize, rounds: u64) {
    let places: Vec<_> = (0..bytes.len()).filter(|at| ![0, 7].contains(&bytes[*at])).collect();
    let whole = volume(bytes).expect("it is recognised");
    assert!(walk(&whole) >= least, "all is found");
    for seed in 0..rounds {
        if let Some(volume) = volume(&damage(bytes, &places, seed)) {
            walk(&volume);
        }
    }
}

#[test]
fn damaged_ext4_costs_a_moment_and_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("tree");
    std::fs::create_dir_all(root.join("a/b/c")).unwrap();
    for number in 0..40 {
        std::fs::write(root.join(format!("a/file {number}")), vec![7; 3000]).unwrap();
    }
    std::os::unix::fs::symlink("x".repeat(100), root.join("link")).unwrap();
    let disk = directory.path().join("disk");
    let (disk, root) = (disk.to_str().unwrap(), root.to_str().unwrap());
    // Without sums, so that damage gets past them.
    let features = "^metadata_csum,^has_journal";
    if made("mke2fs", &["-q", "-t", "ext4", "-O", features, "-d", root, disk, "2M"]) {
        survives(&std::fs::read(disk).unwrap(), 44, 60);
    }
}

#[test]
fn an_ext4_that_asks_for_memory_without_end_is_refused() {
    let mut bytes = vec![0; 1 << 20];
    let mut word = |at: usize, value: u32| {
        bytes[1024 + at..][..4].copy_from_slice(&value.to_le_bytes());
    };
    // 2^32 blocks, each a group.
    word(0x0, u32::MAX);
    word(0x4, u32::MAX);
    word(0x20, 1);
    word(0x28, 16);
    word(0x38, 0xef53);
    word(0x4c, 1);
    word(0x58, 256);
    let volume = volume(&bytes).expect("the mark is there");
    assert!(volume.list(b"").is_err());
    assert!(volume.info(b"").is_ok(), "the directory is shown");
}

#[test]
fn damaged_fat_costs_a_moment_and_no_more() {
    for (bits, size, rounds) in [("12", 1 << 20, 40), ("16", 4 << 20, 40), ("32", 34 << 20, 5)] {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk");
        std::fs::File::create(&disk).unwrap().set_len(size).unwrap();
        let path = disk.to_str().unwrap();
        if !made("mkfs.vfat", &["-F", bits, "-s", "1", path]) {
            return;
        }
        {
            let file = std::fs::File::options().read(true).write(true).open(&disk).unwrap();
            let system = fatfs::FileSystem::new(file, fatfs::FsOptions::new()).unwrap();
            let deep =
                system.root_dir().create_dir("A long name").unwrap().create_dir("b").unwrap();
            for number in 0..20 {
                let mut file = deep.create_file(&format!("file number {number}.txt")).unwrap();
                std::io::Write::write_all(&mut file, &[7; 3000]).unwrap();
            }
        }
        survives(&std::fs::read(&disk).unwrap(), 22, rounds);
    }
}
