//! Block devices that are stacked on files or on other devices: loop devices, partitions, volumes
//! of the device mapper, arrays. What is written to one of them changes what is read from another.

use std::ffi::OsStr;
use std::fs;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use imgfmt::storage::FileIdentity;
use rustix::fs::{major, makedev, minor};

/// The kernel's directory of block devices by number. Reading it takes no privileges.
const DEVICES: &str = "/sys/dev/block";

/// The maximum number of places of one device, so that a large array does not take long.
const PLACES_MAX: usize = 1024;

/// The unit of offsets and sizes in sysfs, in bytes.
const SECTOR: u64 = 512;

/// Returns whether a change of one of them may change the other: they are the same, one of them is
/// stacked on the other, or both are stacked on a part of a third one.
///
/// The kernel does not tell where a volume is on the devices below it. So two volumes on one device
/// are considered different disks, as those of LVM are.
pub(crate) fn share_data(one: FileIdentity, other: FileIdentity) -> bool {
    share_data_in(Path::new(DEVICES), one, other)
}

fn share_data_in(devices: &Path, one: FileIdentity, other: FileIdentity) -> bool {
    let (ones, others) = (places(devices, one), places(devices, other));
    ones.iter().any(|one| others.iter().any(|other| one.overlaps(other)))
}

/// A place that has the bytes of a device.
#[derive(Clone, Debug)]
struct Place {
    file: FileIdentity,
    /// Offsets in bytes.
    range: Range<u64>,
    /// Whether the range has nothing but bytes of the device.
    is_exact: bool,
}

impl Place {
    fn overlaps(&self, other: &Self) -> bool {
        self.file == other.file
            && (self.is_exact || other.is_exact)
            && self.range.start.max(other.range.start) < self.range.end.min(other.range.end)
    }

    /// The same bytes on a file that has them from `start` on, and at most `size` of them.
    fn on(&self, file: FileIdentity, start: u64, size: u64) -> Self {
        let at = |offset: u64| start.saturating_add(offset.min(size));
        Self { file, range: at(self.range.start)..at(self.range.end), is_exact: self.is_exact }
    }
}

/// Returns the file or device itself and everything below it.
fn places(devices: &Path, of: FileIdentity) -> Vec<Place> {
    let mut places = vec![Place { file: of, range: 0..u64::MAX, is_exact: true }];
    let mut examined = 0;
    while let Some(place) = places.get(examined).filter(|_| places.len() < PLACES_MAX) {
        let below = below(devices, place);
        places.extend(below);
        examined += 1;
    }
    places
}

/// Returns the places that the next layer down has the bytes in.
fn below(devices: &Path, place: &Place) -> Vec<Place> {
    // Only devices have no inode number.
    if place.file.inode != 0 {
        return Vec::new();
    }
    let device = place.file.device;
    let directory = devices.join(format!("{}:{}", major(device), minor(device)));
    if let Ok(name) = fs::read(directory.join("loop/backing_file")) {
        let name = name.strip_suffix(b"\n").unwrap_or(&name);
        let offset = number(&directory.join("loop/offset")).unwrap_or_default();
        let size = number(&directory.join("loop/sizelimit")).filter(|size| *size > 0);
        let file = FileIdentity::of(Path::new(OsStr::from_bytes(name)));
        let part = file.map(|file| place.on(file, offset, size.unwrap_or(u64::MAX)));
        return part.into_iter().collect();
    }
    if directory.join("partition").exists() {
        // A partition is below its disk.
        let sectors =
            |name: &str| number(&directory.join(name)).and_then(|it| it.checked_mul(SECTOR));
        let part = device_in(&directory.join("..")).zip(sectors("start").zip(sectors("size")));
        return part.map(|(disk, (start, size))| place.on(disk, start, size)).into_iter().collect();
    }
    let slaves = fs::read_dir(directory.join("slaves")).into_iter().flatten().flatten();
    slaves
        .filter_map(|slave| device_in(&slave.path()))
        .map(|file| Place { file, range: 0..u64::MAX, is_exact: false })
        .collect()
}

/// Returns the device that a directory describes.
fn device_in(directory: &Path) -> Option<FileIdentity> {
    let text = fs::read_to_string(directory.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(FileIdentity { device: makedev(major.parse().ok()?, minor.parse().ok()?), inode: 0 })
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tempfile::TempDir;

    use super::*;

    /// The directory of the kernel, with devices that do not exist here.
    struct Devices(TempDir);

    impl Devices {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        /// Adds a device with attributes; names that end with a slash are of directories.
        fn add(&self, minor: u32, place: &str, attributes: &[(&str, &str)]) -> FileIdentity {
            let directory = self.0.path().join(place);
            fs::create_dir_all(&directory).unwrap();
            let link = self.0.path().join(format!("7:{minor}"));
            if !link.exists() {
                std::os::unix::fs::symlink(&directory, link).unwrap();
            }
            for (name, value) in [("dev", &*format!("7:{minor}\n"))].iter().chain(attributes) {
                let path = directory.join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, value).unwrap();
            }
            FileIdentity { device: makedev(7, minor), inode: 0 }
        }

        /// A loop device on a file or a device.
        fn on_file(&self, minor: u32, file: &Path, offset: u64, limit: u64) -> FileIdentity {
            let name = format!("{}\n", file.display());
            let (offset, limit) = (format!("{offset}\n"), format!("{limit}\n"));
            let attributes = [
                ("loop/backing_file", &*name),
                ("loop/offset", &*offset),
                ("loop/sizelimit", &*limit),
            ];
            self.add(minor, &format!("loop{minor}"), &attributes)
        }

        /// A partition, in sectors.
        fn partition(&self, minor: u32, disk: u32, start: u64, size: u64) -> FileIdentity {
            let (start, size) = (format!("{start}\n"), format!("{size}\n"));
            let attributes = [("partition", "1\n"), ("start", &*start), ("size", &*size)];
            self.add(minor, &format!("loop{disk}/loop{disk}p{minor}"), &attributes)
        }

        /// A volume of the device mapper.
        fn volume(&self, minor: u32, below: &[u32]) -> FileIdentity {
            let slaves = below.iter().map(|it| (format!("slaves/{it}/dev"), format!("7:{it}\n")));
            let slaves: Vec<_> = slaves.collect();
            let slaves: Vec<_> = slaves.iter().map(|(name, dev)| (&**name, &**dev)).collect();
            self.add(minor, &format!("dm-{minor}"), &slaves)
        }

        #[track_caller]
        fn judge(&self, one: FileIdentity, other: FileIdentity, expected: bool) {
            for (one, other) in [(one, other), (other, one)] {
                assert_eq!(share_data_in(self.0.path(), one, other), expected);
            }
        }

        fn file(&self, name: &str) -> (PathBuf, FileIdentity) {
            let path = self.0.path().join(name);
            fs::write(&path, "disk").unwrap();
            let identity = FileIdentity::of(&path).unwrap();
            (path, identity)
        }
    }

    #[test]
    fn a_volume_shares_data_with_what_is_below_it_at_any_depth() {
        let devices = Devices::new();
        let (path, file) = devices.file("disk");
        let (_, other_file) = devices.file("other");
        let disk = devices.on_file(0, &path, 0, 0);
        let first = devices.partition(1, 0, 8, 16);
        let second = devices.partition(2, 0, 24, 16);
        let volume = devices.volume(10, &[2]);
        let above = devices.volume(11, &[10]);
        for alias in [file, disk, second, volume, above] {
            devices.judge(above, alias, true);
        }
        // What is on another partition is another disk.
        devices.judge(above, first, false);
        devices.judge(first, second, false);
        devices.judge(first, disk, true);
        devices.judge(above, other_file, false);
    }

    #[test]
    fn volumes_on_one_device_are_different_disks() {
        let devices = Devices::new();
        let (path, _) = devices.file("disk");
        devices.on_file(0, &path, 0, 0);
        let [one, other] = [10, 11].map(|minor| devices.volume(minor, &[0]));
        devices.judge(one, other, false);
        // Two paths lead to this one.
        devices.add(1, "sda", &[]);
        devices.add(2, "sdb", &[]);
        let multipath = devices.volume(12, &[1, 2]);
        devices.judge(multipath, FileIdentity { device: makedev(7, 2), inode: 0 }, true);
    }

    #[test]
    fn loop_devices_on_one_file_share_what_both_show_of_it() {
        let devices = Devices::new();
        let (path, file) = devices.file("disk");
        let head = devices.on_file(0, &path, 0, 4096);
        let tail = devices.on_file(1, &path, 4096, 0);
        let all = devices.on_file(2, &path, 0, 0);
        devices.judge(head, tail, false);
        for part in [head, tail] {
            devices.judge(part, all, true);
            devices.judge(part, file, true);
        }
        // A partition of the second one, in the first sectors of the part of the file.
        let partition = devices.partition(3, 1, 0, 1);
        devices.judge(partition, head, false);
        devices.judge(partition, all, true);
    }

    #[test]
    fn devices_that_are_said_to_be_below_each_other_end_the_search() {
        let devices = Devices::new();
        let [one, other] = [(10, 11), (11, 10)].map(|(own, below)| devices.volume(own, &[below]));
        devices.judge(one, other, true);
        devices.judge(one, FileIdentity { device: makedev(7, 9), inode: 0 }, false);
    }
}
