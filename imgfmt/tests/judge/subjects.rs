//! The kinds of images that the tests change.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use imgfmt::testing::{FailingStorage, Recorder, RecordingStorage};
use imgfmt::{Access, CacheMode, Format, Image, OpenOptions, OpenPolicy, Storage};

use crate::common::{Random, qemu, run, text};

/// How an image starts out.
#[derive(Clone, Copy, Debug)]
pub struct Subject {
    /// As for `qemu-img create -o`; `DIR` is the directory.
    pub options: &'static str,
    pub start: Start,
}

/// What an image holds at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    Empty,
    /// Some writes, zeroes and discards.
    Used,
    /// Used, two snapshots, and used again.
    Snapshots,
    /// Every cluster compressed where that saves space.
    Compressed,
    /// An overlay over a used, shorter qcow2 image.
    Overlay,
    /// An overlay over a raw file that is longer than it.
    RawOverlay,
}

/// A made image: its bytes, what it shows, and what its snapshots show.
pub struct Made {
    pub path: PathBuf,
    pub bytes: Vec<u8>,
    pub content: Vec<u8>,
    pub snapshots: Vec<(String, Vec<u8>)>,
    /// The data file's bytes, if there is one.
    pub data: Option<(PathBuf, Vec<u8>)>,
}

impl Subject {
    pub const fn new(options: &'static str, start: Start) -> Self {
        Self { options, start }
    }

    /// Makes the image in a directory.
    pub fn make(&self, directory: &Path, size: u64, random: &mut Random) -> Made {
        let path = directory.join("disk.qcow2");
        let data_path = directory.join("data.raw");
        for old in [&path, &data_path] {
            let _ = std::fs::remove_file(old);
        }
        let options = self.options.replace("DIR", text(directory));
        let mut snapshots = Vec::new();
        let use_it = |random: &mut Random| {
            qemu::io(&path, "qcow2", &qemu::random_commands(random, size, 20));
        };
        match self.start {
            Start::Empty => qemu::create(&path, &options, &size.to_string()),
            Start::Used => {
                qemu::create(&path, &options, &size.to_string());
                use_it(random);
            }
            Start::Snapshots => {
                qemu::create(&path, &options, &size.to_string());
                for name in ["first", "second"] {
                    use_it(random);
                    snapshots.push((name.to_owned(), qemu::content(&path, "qcow2")));
                    run("qemu-img", &["snapshot", "-c", name, text(&path)]);
                }
                use_it(random);
            }
            Start::Compressed => make_compressed(&path, &options, size),
            Start::Overlay | Start::RawOverlay => {
                make_overlay(self.start, &path, &options, size, random);
                use_it(random);
            }
        }
        let content = qemu::content(&path, "qcow2");
        let data = data_path.exists().then(|| (data_path.clone(), read(&data_path)));
        Made { bytes: read(&path), content, snapshots, data, path }
    }
}

fn make_compressed(path: &Path, options: &str, size: u64) {
    let source = path.with_extension("source");
    let mut bytes = Vec::with_capacity(size as usize + 700);
    for i in 0..size.div_ceil(700) {
        bytes.extend_from_slice(&[(i / 3) as u8; 700]);
    }
    bytes.truncate(size as usize);
    std::fs::write(&source, bytes).unwrap();
    let mut arguments = vec!["convert", "-c", "-f", "raw", "-O", "qcow2"];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    arguments.extend([text(&source), text(path)]);
    run("qemu-img", &arguments);
}

fn make_overlay(start: Start, path: &Path, options: &str, size: u64, random: &mut Random) {
    let (format, length) = match start {
        Start::RawOverlay => ("raw", size + 300_032),
        _ => ("qcow2", size / 2 / 512 * 512),
    };
    let base = path.with_extension(format!("base.{format}"));
    let _ = std::fs::remove_file(&base);
    run("qemu-img", &["create", "-q", "-f", format, text(&base), &length.to_string()]);
    qemu::io(&base, format, &qemu::random_commands(random, length, 20));
    let mut arguments = vec!["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", format];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    let size = size.to_string();
    arguments.extend([text(path), &size]);
    run("qemu-img", &arguments);
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

/// How the tests open images: writable, any file allowed, and with a cache that holds next to
/// nothing so that tables come and go.
pub fn options() -> OpenOptions {
    OpenOptions::new()
        .format(Format::Qcow2)
        .access(Access::ReadWrite)
        .policy(OpenPolicy::any_file())
        .metadata_cache_bytes(0)
}

/// A made image on storages that record, and that can fail.
pub struct OnTrial {
    pub recorder: Recorder,
    pub file: Arc<FailingStorage>,
    pub data: Option<Arc<FailingStorage>>,
    recorded_file: Arc<RecordingStorage>,
    recorded_data: Option<Arc<RecordingStorage>>,
}

impl OnTrial {
    pub fn new(made: &Made) -> Self {
        let recorder = Recorder::new();
        let recorded_file = recorder.storage(&renamed(made, &made.bytes, Direction::ToTrial));
        let file = FailingStorage::new(Arc::clone(&recorded_file) as _);
        let recorded_data = made.data.as_ref().map(|(_, bytes)| recorder.storage(bytes));
        let data = recorded_data.as_ref().map(|data| FailingStorage::new(Arc::clone(data) as _));
        Self { recorder, file, data, recorded_file, recorded_data }
    }

    /// Opens the image.
    pub fn open(&self) -> imgfmt::Result<Image> {
        self.open_cached(CacheMode::default())
    }

    /// Opens the image in a cache mode.
    pub fn open_cached(&self, cache: CacheMode) -> imgfmt::Result<Image> {
        let mut options = options().cache(cache);
        if let Some(data) = self.data.clone() {
            let opener = move |_: &str| Ok(Arc::clone(&data) as Arc<dyn Storage>);
            options.policy = OpenPolicy::any_file().allow_scheme("trial", Arc::new(opener));
        }
        Image::from_storage(Arc::clone(&self.file) as _, &options)
    }

    /// Puts the files as they are now where the made image was.
    pub fn put_down(&self, made: &Made) {
        let bytes = renamed(made, &self.recorded_file.content(), Direction::FromTrial);
        std::fs::write(&made.path, bytes).unwrap();
        if let (Some(data), Some((path, _))) = (&self.recorded_data, &made.data) {
            std::fs::write(path, data.content()).unwrap();
        }
    }

    /// Puts the files as a crash could leave them where the made image was.
    pub fn crash(
        &self,
        made: &Made,
        position: usize,
        loss: imgfmt::testing::Loss,
        random: &mut Random,
    ) {
        let mut below = |bound| random.below(bound);
        let bytes = self.recorded_file.after_crash(position, loss, &mut below);
        std::fs::write(&made.path, renamed(made, &bytes, Direction::FromTrial)).unwrap();
        if let (Some(data), Some((path, _))) = (&self.recorded_data, &made.data) {
            std::fs::write(path, data.after_crash(position, loss, &mut below)).unwrap();
        }
    }
}

enum Direction {
    ToTrial,
    FromTrial,
}

/// Replaces the data file's name in the header by one of a scheme that leads to the trial's
/// storage, or the other way round.
fn renamed(made: &Made, bytes: &[u8], direction: Direction) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if let Some((path, _)) = &made.data {
        let real = text(path).as_bytes().to_vec();
        let mut trial = b"trial:".to_vec();
        trial.resize(real.len(), b'x');
        let (old, new) = match direction {
            Direction::ToTrial => (real, trial),
            Direction::FromTrial => (trial, real),
        };
        let place = bytes.windows(old.len()).take(4096).position(|window| window == old);
        let place = place.expect("the header names the data file");
        bytes[place..place + new.len()].copy_from_slice(&new);
    }
    bytes
}

/// How much may be wrong with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tolerance {
    Nothing,
    Leaks,
    /// Leaks, and COPIED bits that do not fit the refcounts. There is no way to change both at
    /// once; making a snapshot passes through such a state.
    CopiedFlags,
}

/// Fails if `qemu-img check` finds more than is tolerated.
pub fn qemu_check(path: &Path, tolerance: Tolerance, what: &str) {
    let output =
        Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    let is_fine = match output.status.code() {
        Some(0) => true,
        Some(3) => tolerance != Tolerance::Nothing,
        Some(2) if tolerance == Tolerance::CopiedFlags => {
            let mut errors = said.lines().filter(|line| line.starts_with("ERROR"));
            errors.all(|line| line.starts_with("ERROR OFLAG_COPIED"))
        }
        _ => false,
    };
    let said: String = said.lines().take(20).collect::<Vec<_>>().join("\n");
    assert!(is_fine, "{what}: qemu-img check: {said}");
}

/// Fails unless the snapshots of a made image are what they were.
pub fn check_snapshots(made: &Made, what: &str) {
    for (name, expected) in &made.snapshots {
        let options = OpenOptions::new().snapshot(name).policy(OpenPolicy::any_file());
        let image = Image::open(&made.path, &options).unwrap();
        let mut found = vec![0xee; expected.len()];
        image.read_at(imgfmt::GuestOffset::new(0), &mut found).unwrap();
        assert!(found == *expected, "{what}: snapshot '{name}' has changed");
    }
}

/// How many rounds a loop has, from the environment. The number is printed for `cargo xtask soak`,
/// which adds up what was judged.
#[allow(clippy::print_stdout)]
pub fn rounds(name: &str, default: u64) -> u64 {
    let rounds = std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    println!("judged: {rounds}");
    rounds
}
