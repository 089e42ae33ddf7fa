//! The power fails below a complete file system, so that the sidecar of an image and its rename are
//! recorded as well: bitmaps are recovered, and have missed no change that reached the disk.

use std::ffi::OsStr;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::Command;

use imgfmt::{BitmapState, Format, GuestOffset, GuestRange, Image, OpenOptions};
use tempfile::TempDir;

use super::{DIRECT, History, assert_ring_was_used, fail, is_durable, judge, load};
use crate::support::loop_device::LoopDevice;
use crate::support::mount::can_mount;
use crate::support::random::Random;
use crate::support::recording::{Loss, Recording, SECTOR};
use crate::support::{Outcome, PROGRAM, Server, peer, run, tool};

/// The size of the file system.
const ROOM: u64 = 16 << 20;
/// Each writer writes to an extent of the sidecar's log of its own.
const STRIDE: u64 = 4 << 20;
const SIZE: u64 = 72 << 20;

/// A file system that is mounted until this is dropped.
struct FileSystem {
    directory: TempDir,
    _device: LoopDevice,
}

impl FileSystem {
    /// Mounts the file system that is in a file. `None` if there are no loop devices.
    fn mount(file: &str) -> Option<Self> {
        let device = LoopDevice::on(file)?;
        let directory = tempfile::tempdir().expect("a directory");
        let mounted = run(Command::new("mount").arg(&device.0).arg(directory.path()));
        assert_eq!(mounted.code, Some(0), "{mounted:?}");
        Some(Self { directory, _device: device })
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        let detach = rustix::mount::UnmountFlags::DETACH;
        let _ = rustix::mount::unmount(self.directory.path(), detach);
    }
}

/// A command that runs after a restart of the machine, which has another boot id.
fn after_restart(directory: &TempDir, arguments: &[&OsStr]) -> Outcome {
    let boot_id = path_in(directory, "boot_id");
    std::fs::write(&boot_id, "00000000-0000-4000-8000-000000000000\n").expect("room");
    const SCRIPT: &str = r#"mount --bind "$1" /proc/sys/kernel/random/boot_id
        shift
        exec "$@""#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-e", "-c", SCRIPT, "sh", &boot_id]);
    run(command.args(arguments))
}

/// Recovers the bitmaps after a restart.
fn recover(image: &Path, directory: &TempDir) {
    let arguments = [PROGRAM.as_ref(), "bitmap".as_ref(), "recover".as_ref(), image.as_os_str()];
    let recovered = after_restart(directory, &arguments);
    assert_eq!(recovered.code, Some(0), "{recovered:?}");
}

/// Checks that the bitmap is reliable and that it has all sectors that are not zero.
fn judge_bitmap(image: &Path, content: &[u8], what: &str) {
    let image = Image::open(image, &OpenOptions::new().format(Format::Qcow2)).expect(what);
    let bitmap = image.bitmaps().remove(0);
    let is_reliable = matches!(bitmap.state, BitmapState::Consistent { .. });
    assert!(is_reliable && !bitmap.is_in_use, "{what}: {bitmap:?}");
    let all = GuestRange::new(GuestOffset::new(0), SIZE).expect("a range");
    for extent in image.dirty_extents("changes", all, usize::MAX).expect(what) {
        let start = extent.range.offset().bytes();
        let bytes = &content[start as usize..][..extent.range.length() as usize];
        let sector = bytes.iter().position(|byte| *byte != 0).map(|at| start + at as u64);
        let sector = sector.filter(|_| !extent.is_dirty).map(|at| at / SECTOR);
        assert_eq!(sector, None, "{what}: this sector was changed, the bitmap has missed it");
    }
}

/// What was recorded while clients wrote to the image `vm` in the file system.
struct Recorded {
    /// Has the file `disk`, which is the file system.
    directory: TempDir,
    recording: Recording,
    history: History,
    /// The position before the server ended.
    loaded: usize,
    cache: &'static str,
}

impl Recorded {
    /// Serves an image with a bitmap, and writes to it. `None` if this system cannot.
    fn new(options: &str, cache: &'static str) -> Option<Self> {
        let (qemu_img, mkfs) = (tool("qemu-img")?, tool("mkfs.ext4")?);
        if !can_mount() || !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can mount a file system");
            return None;
        }
        let directory = tempfile::tempdir().expect("a directory");
        let tried = after_restart(&directory, &["true".as_ref()]);
        if tried.code != Some(0) {
            eprintln!("skipped: the boot id cannot be changed here: {tried:?}");
            return None;
        }
        let disk = path_in(&directory, "disk");
        std::fs::File::create(&disk).expect("a file").set_len(ROOM).expect("room for a hole");
        peer(&mkfs, &["-q", "-F", "-E", "lazy_itable_init=0", &disk]);
        let files = FileSystem::mount(&disk)?;
        let in_files = |arguments: &[&str]| {
            run(Command::new(&qemu_img).args(arguments).current_dir(&files.directory)).success();
        };
        in_files(&["create", "-q", "-f", "qcow2", "-o", options, "vm", "72M"]);
        in_files(&["bitmap", "--add", "-g", "4096", "vm", "changes"]);
        drop(files);
        let recording = Recording::new(directory.path(), &["disk"], ROOM);
        let files = FileSystem::mount(&recording.path("disk"))?;
        let metrics = recording.path("metrics");
        let (image, address) = (path_in(&files.directory, "vm"), format!("unix:{metrics}"));
        let arguments = ["--cache", cache, "--metrics", &address, "--trust-image", "-f", "qcow2"];
        let server = Server::ours(&[&arguments[..], &[&image]].concat());
        let history = load(server.uri(), recording.log(), is_durable(cache), STRIDE / SECTOR);
        assert_ring_was_used(&metrics, DIRECT.contains(&cache));
        assert!(files.directory.path().join("vm.dirty").is_file(), "there is no sidecar");
        let loaded = recording.log().lock().expect("no panic").len();
        server.end();
        drop(files);
        Some(Self { directory, recording, history, loaded, cache })
    }

    /// Mounts what the crash has left, recovers the bitmaps, changes the image, and checks all.
    fn judge(&self, position: usize, what: &str, change: impl Fn(&Path)) {
        let files = FileSystem::mount(&path_in(&self.directory, "disk")).expect("a device");
        let image = files.directory.path().join("vm");
        let content = judge(&image, Format::Qcow2, &self.history, position, what);
        recover(&image, &self.directory);
        change(&image);
        judge_bitmap(&image, &content, what);
    }

    /// Lets the power fail.
    fn cut(&self) {
        fail(
            &self.recording,
            &self.history,
            (self.cache, self.directory.path()),
            |position, what| {
                self.judge(position, what, |_| {});
            },
        );
    }
}

fn path_in(directory: &TempDir, name: &str) -> String {
    directory.path().join(name).to_str().expect("a plain name").to_owned()
}

#[test]
fn bitmaps_in_a_sidecar_miss_no_change_when_the_power_fails() {
    for (cluster_size, cache) in [("65536", "none"), ("4096", "writeback")] {
        let recorded = Recorded::new(&format!("cluster_size={cluster_size}"), cache);
        let Some(recorded) = recorded else { return };
        recorded.cut();
    }
}

#[test]
fn bitmaps_of_a_raw_data_file_miss_no_change_when_the_power_fails() {
    for cache in DIRECT {
        let Some(recorded) = Recorded::new("data_file=data,data_file_raw=on", cache) else {
            return;
        };
        recorded.cut();
    }
}

#[test]
fn a_bitmap_that_has_missed_changes_would_be_noticed() {
    let Some(recorded) = Recorded::new("cluster_size=65536", "none") else { return };
    let Recorded { recording, directory, loaded, .. } = &recorded;
    recording.crash(*loaded, Loss::Nothing, &mut Random::new(1), directory.path());
    let judged = std::panic::catch_unwind(AssertUnwindSafe(|| {
        recorded.judge(*loaded, "control", |image| {
            run(Command::new(PROGRAM).args(["bitmap", "clear"]).arg(image).arg("changes"))
                .success();
        });
    }));
    let error = judged.expect_err("it was not noticed");
    let error = error.downcast_ref::<String>().expect("a text");
    assert!(error.contains("the bitmap has missed it"), "{error}");
}
