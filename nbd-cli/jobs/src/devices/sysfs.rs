//! The kernel's information about its NBD devices, in `/sys/block`.

use std::path::{Path, PathBuf};

use rustix::process::Pid;

/// The bytes in a sector of the kernel's sizes.
const SECTOR: u64 = 512;

/// A device of the kernel, connected or not.
#[derive(Clone, Debug)]
pub(super) struct SysDevice {
    index: u32,
    directory: PathBuf,
}

/// One attachment of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attachment {
    /// The process that has connected it, whether it runs or not.
    pid: String,
    backend: Option<String>,
}

impl SysDevice {
    pub(super) fn new(index: u32) -> Self {
        Self { index, directory: Path::new("/sys/block").join(format!("nbd{index}")) }
    }

    /// All devices that the kernel has.
    pub(super) fn all() -> Vec<Self> {
        let entries = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
        let indexes = entries
            .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("nbd")?.parse().ok());
        let mut indexes: Vec<u32> = indexes.collect();
        indexes.sort_unstable();
        indexes.into_iter().map(Self::new).collect()
    }

    pub(super) fn index(&self) -> u32 {
        self.index
    }

    pub(super) fn exists(&self) -> bool {
        self.directory.is_dir()
    }

    /// Whether it has a server, reachable or not.
    pub(super) fn is_connected(&self) -> bool {
        self.directory.join("pid").exists()
    }

    /// Returns what tells one attachment of this device from the next; `None` if it is not
    /// attached.
    pub(super) fn attachment(&self) -> Option<Attachment> {
        Some(Attachment { pid: self.text("pid")?, backend: self.backend() })
    }

    /// The process that has connected it, as far as it still runs.
    pub(super) fn pid(&self) -> Option<u32> {
        let pid = self.text("pid")?.parse().ok()?;
        let found =
            Pid::from_raw(pid).filter(|pid| rustix::process::test_kill_process(*pid).is_ok());
        found.map(|_| pid.cast_unsigned())
    }

    /// In bytes.
    pub(super) fn size(&self) -> u64 {
        self.number("size").unwrap_or(0).saturating_mul(SECTOR)
    }

    pub(super) fn block_size(&self) -> Option<u64> {
        self.number("queue/logical_block_size")
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.number("ro") == Some(1)
    }

    /// The identifier that was given when it was connected.
    pub(super) fn backend(&self) -> Option<String> {
        self.text("backend").filter(|text| !text.is_empty())
    }

    /// Lets the kernel send no larger requests than this number of bytes.
    pub(super) fn limit_requests(&self, bytes: u64) -> std::io::Result<()> {
        let Some(limit) = self.number("queue/max_sectors_kb") else { return Ok(()) };
        if bytes / 1024 >= limit {
            return Ok(());
        }
        std::fs::write(self.directory.join("queue/max_sectors_kb"), (bytes / 1024).to_string())
    }

    /// Why it is in use: where it is mounted, or what has it, for people.
    pub(super) fn user(&self) -> Option<String> {
        let mut numbers = vec![self.text("dev")?];
        let name = format!("nbd{}", self.index);
        let parts = std::fs::read_dir(&self.directory).into_iter().flatten().flatten();
        for part in parts.filter(|part| part.file_name().to_string_lossy().starts_with(&name)) {
            numbers.extend(std::fs::read_to_string(part.path().join("dev")).ok());
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        if let Some(place) = mounted_at(&mounts, &numbers) {
            return Some(format!("it is mounted at {place}"));
        }
        let holders = std::fs::read_dir(self.directory.join("holders")).ok()?;
        let holder = holders.flatten().next()?;
        Some(format!("/dev/{} is made of it", holder.file_name().to_string_lossy()))
    }

    fn number(&self, file: &str) -> Option<u64> {
        self.text(file)?.parse().ok()
    }

    fn text(&self, file: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.directory.join(file)).ok()?;
        Some(text.trim().to_owned())
    }
}

/// Finds one of the device numbers (`43:0`) in the kernel's list of mounts.
fn mounted_at<'a>(mounts: &'a str, numbers: &[String]) -> Option<&'a str> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(2);
        let number = fields.next()?;
        numbers.iter().any(|wanted| wanted.trim() == number).then(|| fields.nth(1))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attachment_by_another_process_or_to_another_source_is_another_one() {
        let directory = tempfile::tempdir().expect("a directory");
        let device = SysDevice { index: 7, directory: directory.path().to_owned() };
        let write = |file: &str, text: &str| {
            std::fs::write(directory.path().join(file), text).expect("room");
        };
        assert_eq!(device.attachment(), None);
        write("pid", "11\n");
        write("backend", "/a.qcow2\n");
        let first = device.attachment();
        assert!(first.is_some() && first == device.attachment());
        write("pid", "12\n");
        assert_ne!(device.attachment(), first);
        write("pid", "11\n");
        write("backend", "\n");
        assert_ne!(device.attachment(), first);
    }

    #[test]
    fn a_mounted_device_is_found_by_its_number() {
        let mounts = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
                      90 22 43:1 / /mnt/disk rw,noatime shared:1 - ext4 /dev/nbd0p1 rw\n";
        let numbers = ["43:0\n".to_owned(), "43:1\n".to_owned()];
        assert_eq!(mounted_at(mounts, &numbers), Some("/mnt/disk"));
        assert_eq!(mounted_at(mounts, &numbers[..1]), None);
        assert_eq!(mounted_at("nonsense", &numbers), None);
    }
}
