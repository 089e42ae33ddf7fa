//! The attached devices.

use std::path::PathBuf;

use super::path_of;
use super::record;
use super::sysfs::SysDevice;

/// An attached device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AttachedDevice {
    /// The number in its name.
    pub index: u32,
    /// `/dev/nbdN`.
    pub path: PathBuf,
    /// Size, in bytes.
    pub size: u64,
    /// The size of its logical blocks, in bytes.
    pub block_size: Option<u64>,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// The source it was attached with, if the program that did it says so.
    pub source: Option<String>,
    /// The connections that it was given, if this program attached it.
    pub connections: Option<usize>,
    /// The process that keeps it. Without one, lost connections are not restored.
    pub pid: Option<u32>,
    /// The reason why it cannot be detached: its mount point, or the device that contains it.
    pub user: Option<String>,
}

/// Returns the attached devices, also those that other programs have attached. Needs no rights.
pub fn attached_devices() -> Vec<AttachedDevice> {
    let connected = SysDevice::all().into_iter().filter(SysDevice::is_connected);
    connected.map(|device| describe(&device)).collect()
}

/// Returns whether the kernel has the driver, and devices.
pub fn kernel_has_devices() -> bool {
    !SysDevice::all().is_empty()
}

fn describe(device: &SysDevice) -> AttachedDevice {
    let found = record::look(device.index());
    let source = device.backend();
    // A record without an identifier is left from another attachment.
    let found = found.filter(|found| found.is_kept || source.is_some());
    AttachedDevice {
        index: device.index(),
        path: path_of(device.index()),
        size: device.size(),
        block_size: device.block_size(),
        read_only: device.is_read_only(),
        connections: found.as_ref().map(|found| found.note.connections),
        pid: match &found {
            Some(found) => found.is_kept.then_some(found.note.pid),
            None => device.pid(),
        },
        source,
        user: device.user(),
    }
}
