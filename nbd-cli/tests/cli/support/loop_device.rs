//! Loop devices.

use std::process::Command;

use super::Disk;

/// A loop device that is detached when the test ends.
pub(crate) struct LoopDevice(pub(crate) String);

impl LoopDevice {
    /// A device of so many MiB, full of old bytes. `None` where there are none: only root has them.
    pub(crate) fn with_old_content(directory: &Disk, mebibytes: usize) -> Option<Self> {
        let file = directory.beside(&format!("device-{mebibytes}"));
        std::fs::write(&file, vec![0xaa; mebibytes << 20]).expect("room");
        Self::on(&file)
    }

    /// A device on a file or on another device.
    pub(crate) fn on(file: &str) -> Option<Self> {
        let attached = Command::new("losetup").args(["--find", "--show", file]).output();
        match attached {
            Ok(output) if output.status.success() => {
                Some(Self(String::from_utf8(output.stdout).expect("text").trim().to_owned()))
            }
            other => {
                eprintln!("skipped: no loop device: {other:?}");
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}
