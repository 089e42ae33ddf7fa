//! A process that changes an image and dies: this test program itself, started again.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use imgfmt::{
    Access, BitmapChange, BitmapDurability, BitmapState, Durability, Image, OpenOptions, Speed,
    ZeroMode,
};

use crate::common::{self, Random, at, qemu, range, run, text};

pub const SIZE: u64 = 32 << 20;
const SCRIPT: &str = "IMGFMT_TEST_SCRIPT";

/// An image with two bitmaps that note changes, and one that does not.
pub fn make(directory: &Path) -> PathBuf {
    let path = directory.join("disk.qcow2");
    qemu::create(&path, "", &SIZE.to_string());
    for (granularity, name) in [("512", "fine"), ("64k", "coarse")] {
        run("qemu-img", &["bitmap", "--add", "-g", granularity, text(&path), name]);
    }
    run("qemu-img", &["bitmap", "--add", "--disable", text(&path), "still"]);
    path
}

/// The same in a directory of its own; nothing if QEMU is missing.
pub fn disk() -> Option<(tempfile::TempDir, PathBuf)> {
    qemu::has_qemu().then(|| {
        let directory = tempfile::tempdir().unwrap();
        let path = make(directory.path());
        (directory, path)
    })
}

pub fn options() -> OpenOptions {
    OpenOptions::new().access(Access::ReadWrite)
}

pub fn open(path: &Path) -> Image {
    Image::open(path, &options()).unwrap()
}

pub fn read_only(path: &Path) -> Image {
    Image::open(path, &OpenOptions::new()).unwrap()
}

pub fn content(image: &Image) -> Vec<u8> {
    let mut content = vec![0; image.size() as usize];
    image.read_at(at(0), &mut content).unwrap();
    content
}

pub fn sidecar(path: &Path) -> PathBuf {
    path.with_extension("qcow2.dirty")
}

/// Makes a sidecar say that it was written before the machine was restarted.
pub fn restart(path: &Path) {
    let mut bytes = std::fs::read(sidecar(path)).unwrap();
    bytes[64..100].copy_from_slice(b"11111111-aaaa-bbbb-cccc-dddddddddddd");
    let crc = crc32fast::hash(&bytes[..508]);
    bytes[508..512].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(sidecar(path), bytes).unwrap();
}

/// Why a bitmap is inconsistent, if it is.
pub fn reason(image: &Image, name: &str) -> Option<String> {
    let found = image.bitmaps().into_iter().find(|bitmap| bitmap.name == name).unwrap();
    match found.state {
        BitmapState::Inconsistent { reason } => Some(reason),
        BitmapState::Consistent { .. } => None,
        other => panic!("{other:?}"),
    }
}

/// What QEMU says about the flags of each bitmap.
pub fn flags(path: &Path) -> String {
    let info = run("qemu-img", &["info", "-U", "--output=json", text(path)]);
    let bitmaps = info.split_once("\"bitmaps\"").map_or("", |(_, rest)| rest);
    bitmaps.split_once("\"refcount-bits\"").map_or(bitmaps, |(bitmaps, _)| bitmaps).to_owned()
}

/// Fails unless the image is as if there had been no crash.
pub fn has_no_trace(path: &Path) {
    let header = std::fs::read(path).unwrap();
    assert_eq!(header[88] & 0x80, 0, "the private autoclear bit is set");
    assert!(
        !header[104..4096].windows(8).any(|start| start == b"dirt\0\0\0\x18"),
        "the extension is there"
    );
    assert!(!sidecar(path).exists(), "the sidecar is there");
    assert!(!flags(path).contains("in-use"));
    qemu::check_but_for_leaks(path, "no trace");
}

/// Starts this program again to carry out a script: words, the first of which is what to do.
pub fn start(path: &Path, script: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "survival::the_process_that_dies", "--nocapture"])
        .env(SCRIPT, format!("{script} {}", text(path)))
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap()
}

/// Carries a script out in a process that dies at its end without closing anything.
pub fn die_after(path: &Path, script: &str) {
    let status = start(path, script).wait().unwrap();
    assert_eq!(status.code(), Some(33), "{script}");
}

/// The other side of [`start`]: does nothing in an ordinary run of the tests.
#[test]
fn the_process_that_dies() {
    let Ok(script) = std::env::var(SCRIPT) else { return };
    let words: Vec<&str> = script.split(' ').collect();
    let path = Path::new(words[words.len() - 1]);
    let _image = match words[0] {
        "load" => load(path, words[1]),
        steps => steps.split(',').fold(None, |image, step| Some(one_step(path, image, step))),
    };
    // No destructor runs: to the image this is as sudden as SIGKILL.
    std::process::exit(33);
}

fn durability(name: &str) -> BitmapDurability {
    match name {
        "power" => BitmapDurability::PowerLoss,
        "process" => BitmapDurability::ProcessDeath,
        _ => BitmapDurability::CleanClose,
    }
}

fn one_step(path: &Path, image: Option<Image>, step: &str) -> Image {
    if let Some(level) = step.strip_prefix("open:") {
        return Image::open(path, &options().bitmap_durability(durability(level))).unwrap();
    }
    let image = image.unwrap();
    let named = |name: &str| name.to_owned();
    let change = match step.split(':').collect::<Vec<_>>()[..] {
        ["write", offset, length] => {
            let data = vec![0x5a; length.parse().unwrap()];
            image.write_at(at(offset.parse().unwrap()), &data, Durability::Cached).unwrap();
            return image;
        }
        ["flush"] => {
            image.flush().unwrap();
            return image;
        }
        ["clear", name] => BitmapChange::Clear { name: named(name) },
        ["enable", name] => BitmapChange::Enable { name: named(name) },
        ["disable", name] => BitmapChange::Disable { name: named(name) },
        ["remove", name] => BitmapChange::Remove { name: named(name) },
        ["merge", into, from] => BitmapChange::Merge { into: named(into), from: named(from) },
        _ => panic!("unknown step {step}"),
    };
    image.bitmap_transaction(&[change]).unwrap();
    image
}

/// A file that is there when the load has changed something.
pub fn begun(path: &Path) -> PathBuf {
    path.with_extension("begun")
}

/// Changes the disk with four threads until somebody ends it.
fn load(path: &Path, level: &str) -> Option<Image> {
    let image = Image::open(path, &options().bitmap_durability(durability(level))).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let image = &image;
            scope.spawn(move || {
                let seed = std::process::id() as u64 * 4 + thread;
                let mut random = Random::seeded(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                random_change(image, &mut random);
                std::fs::write(begun(path), "").unwrap();
                loop {
                    random_change(image, &mut random);
                }
            });
        }
    });
    None
}

fn random_change(image: &Image, random: &mut Random) {
    let offset = random.below(SIZE / 512) * 512;
    let length = ((random.below(40) + 1) * 512).min(SIZE - offset);
    let whole = range(offset, length);
    match random.below(40) {
        0 => image.flush().unwrap(),
        1 | 2 => {
            image.write_zeroes(whole, ZeroMode::MayUnmap, Speed::Any, Durability::Cached).unwrap();
        }
        3 => image.discard(whole, Durability::Cached).unwrap(),
        4 => image.write_at(at(offset), &random.bytes(length as usize), Durability::Fua).unwrap(),
        _ => {
            image.write_at(at(offset), &random.bytes(length as usize), Durability::Cached).unwrap();
        }
    }
}

/// Fails unless every byte that differs lies in a dirty part of every bitmap that notes changes;
/// returns how many bytes are dirty in the fine one, and in how many of its parts bytes differ.
pub fn compare(image: &Image, reference: &[u8], what: &str) -> (u64, u64) {
    let now = content(image);
    for name in ["fine", "coarse"] {
        let mut is_dirty = vec![false; (SIZE / 512) as usize];
        for (offset, length) in common::bitmaps::dirty(image, name) {
            is_dirty[(offset / 512) as usize..(offset + length).div_ceil(512) as usize].fill(true);
        }
        let sectors = now.chunks(512).zip(reference.chunks(512)).zip(&is_dirty).enumerate();
        for (sector, ((now, before), is_dirty)) in sectors {
            assert!(now == before || *is_dirty, "{what}: sector {sector} is missing in '{name}'");
        }
    }
    let differ = now.chunks(512).zip(reference.chunks(512)).filter(|(now, then)| now != then);
    let dirty = common::bitmaps::dirty(image, "fine").iter().map(|(_, length)| length).sum();
    (dirty, differ.count() as u64 * 512)
}
