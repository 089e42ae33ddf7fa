//! Kernel devices (`/dev/nbdX`): attaches them to servers and exports, keeps them connected, lists
//! and detaches them.
//!
//! The kernel's driver is a client of its own. It gets connections after their handshake, and
//! speaks the transmission phase with simple replies and without TLS. A plain server is left to it:
//! the requests do not pass through this process, which only makes new connections when the kernel
//! says that one is dead. Images and servers with TLS are an export of this process, which the
//! kernel reaches over socket pairs.
//!
//! The kernel keeps the source of a device as its *backend identifier*. A process that attaches the
//! same source to the same device adopts it: requests that wait for a connection go on.

mod attach;
mod backend;
mod detach;
mod given;
mod list;
mod load;
mod message;
mod netlink;
mod options;
mod record;
mod sysfs;

use std::path::PathBuf;

pub use self::attach::Attached;
pub use self::backend::Backend;
pub use self::detach::{DetachMode, Detached, detach};
pub use self::list::{AttachedDevice, attached_devices, kernel_has_devices};
pub use self::load::ensure_driver;
pub use self::options::AttachOptions;
use crate::error::{JobError, JobErrorKind};

/// Parses the name of a device: `/dev/nbd0`, `nbd0` or a link to it.
///
/// # Errors
///
/// If it is not one of the kernel's NBD devices.
pub fn parse_device(name: &str) -> Result<u32, String> {
    let resolved = std::fs::canonicalize(name).ok();
    let resolved = resolved.as_ref().and_then(|path| path.to_str()).unwrap_or(name);
    let short = resolved.strip_prefix("/dev/").unwrap_or(resolved);
    let digits = short.strip_prefix("nbd").filter(|digits| {
        digits.bytes().all(|byte| byte.is_ascii_digit())
            && (digits.len() == 1 || !digits.starts_with('0'))
    });
    digits
        .and_then(|digits| digits.parse().ok())
        .filter(|index| *index <= MAX_INDEX)
        .ok_or_else(|| format!("'{name}' is not an NBD device; give one such as /dev/nbd0"))
}

/// The kernel numbers devices with signed integers and 4 bits for the partitions.
const MAX_INDEX: u32 = (1 << 16) - 1;

/// Returns the file of a device.
pub fn path_of(device: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{device}"))
}

/// Returns whether a device waits for a process that adopts it, because the one that kept it was
/// killed. Blocks for up to five seconds while another process keeps the device: it may be ending.
pub fn waits_for_adoption(device: u32) -> bool {
    sysfs::SysDevice::new(device).is_connected() && record::has_lost_its_keeper(device)
}

fn device_error(device: u32, why: impl std::fmt::Display) -> JobError {
    JobError::new(JobErrorKind::Device, format!("/dev/nbd{device}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_in_dev() {
        assert_eq!(parse_device("/dev/nbd0"), Ok(0));
        assert_eq!(parse_device("nbd15"), Ok(15));
        for wrong in
            ["/dev/nbd0p1", "/dev/sda", "nbd", "nbd01", "nbd-1", "/tmp/nbd0", "nbd99999999999", ""]
        {
            assert!(parse_device(wrong).is_err(), "{wrong}");
        }
    }
}
