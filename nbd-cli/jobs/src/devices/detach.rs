//! Detaching a device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::load::no_rights;
use super::netlink::Driver;
use super::record::{self, Record};
use super::sysfs::SysDevice;
use super::{device_error, path_of};
use crate::error::{JobError, JobErrorKind};
use crate::tasks;

/// The time between two looks at a device that is about to go.
const PAUSE: Duration = Duration::from_millis(50);

/// The treatment of a device that is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetachMode {
    /// Data is flushed; a device that is in use, or whose data cannot be flushed, is kept.
    #[default]
    WhenUnused,
    /// Data that was not flushed is lost.
    Force,
}

/// Time for a device that was detached by force to become free.
const FORCED: Duration = Duration::from_secs(5);

/// The state of a device that was detached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detached {
    /// It is free, and the process that kept it has closed its image.
    Free,
    /// It has lost its source, and is free when its user lets go of it: where it is mounted, or
    /// what has it open. The process that kept it ends then. Only after [`DetachMode::Force`].
    InUse(String),
}

/// Detaches a device: flushes it, disconnects it, and waits until it is gone and the process that
/// kept it has closed its image. By force it is not waited for if it is in use.
///
/// # Errors
///
/// If there is no such device, if it is in use (it remains then), or if data cannot be flushed.
///
/// # Cancel safety
///
/// The device may or may not be disconnected.
pub async fn detach(device: u32, mode: DetachMode) -> Result<Detached, JobError> {
    let known = SysDevice::new(device);
    if !known.exists() {
        return Err(device_error(device, "this kernel has no such device"));
    }
    if !known.is_connected() {
        return Err(device_error(device, "it is not attached"));
    }
    let mut driver = super::load::driver()?;
    let detaching = tasks::spawn_blocking(move || disconnect(&mut driver, device, mode));
    detaching.await.map_err(|error| JobError::given_up("detachment", &error))??;
    let start = Instant::now();
    while known.is_connected() {
        if mode == DetachMode::Force {
            let user = known.user();
            if user.is_some() || start.elapsed() > FORCED {
                let user = user.unwrap_or_else(|| "a program has it open".to_owned());
                return Ok(Detached::InUse(user));
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
    while record::look(device).is_some_and(|found| found.is_kept) {
        tokio::time::sleep(PAUSE).await;
    }
    // What a killed process has left.
    if let Ok(record) = Record::take(device)
        && !known.is_connected()
    {
        record.remove();
    }
    Ok(Detached::Free)
}

/// Flushes and disconnects a device. Blocks.
pub(super) fn disconnect(
    driver: &mut Driver,
    device: u32,
    mode: DetachMode,
) -> Result<(), JobError> {
    // Held until it is disconnected, so that it cannot be mounted before.
    let _alone = match mode {
        DetachMode::WhenUnused => Some(flushed(device)?),
        DetachMode::Force => None,
    };
    driver.disconnect(device).map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::PERM) => no_rights(),
        _ => device_error(device, format!("the kernel does not disconnect it: {error}")),
    })
}

/// Opens a device that is not in use, and flushes it.
fn flushed(device: u32) -> Result<File, JobError> {
    let path = path_of(device);
    let file = open_alone(&path).map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::BUSY) => {
            let user = SysDevice::new(device).user().unwrap_or_else(|| "it is in use".to_owned());
            device_error(device, format!("{user}; unmount it or end its user first (`nbd-cli detach --force` detaches it anyway, and loses data)"))
        }
        _ => device_error(device, format!("cannot open it to flush it: {error}")),
    })?;
    file.sync_all().map_err(|error| {
        JobError::new(
            JobErrorKind::Device,
            format!(
                "cannot flush {}: {error}; bring its server back, or use `nbd-cli detach --force` and lose \
                 what was not written",
                path.display()
            ),
        )
    })?;
    Ok(file)
}

/// Opens a block device, unless it is mounted or part of another device.
fn open_alone(path: &Path) -> io::Result<File> {
    let exclusive = OFlags::EXCL.bits().cast_signed();
    OpenOptions::new().read(true).custom_flags(exclusive).open(path)
}
