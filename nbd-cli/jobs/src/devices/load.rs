//! Finds the kernel's driver, and loads it if that is necessary and allowed.

use std::io;
use std::process::{Command, Stdio};

use rustix::thread::CapabilitySet;

use super::netlink::Driver;
use crate::error::{JobError, JobErrorKind};
use crate::text::printable;

/// Where `modprobe` is, for a PATH without the directories of administrators.
const MODPROBE: [&str; 3] = ["modprobe", "/sbin/modprobe", "/usr/sbin/modprobe"];

/// Finds the kernel's driver, or loads it: to be called before anything is opened.
///
/// # Errors
///
/// If the kernel has none, or the right to use it is missing.
pub fn ensure_driver() -> Result<(), JobError> {
    driver().map(drop)
}

/// Opens the kernel's driver.
///
/// # Errors
///
/// If the kernel has none, or the right to use it is missing.
pub(super) fn driver() -> Result<Driver, JobError> {
    if !may_administer() {
        return Err(no_rights());
    }
    let found = Driver::open();
    let found = match found {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            load()?;
            Driver::open()
        }
        found => found,
    };
    found.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => no_driver("the module 'nbd' is loaded, but does not answer"),
        _ => JobError::new(
            JobErrorKind::Device,
            format!("the kernel cannot be asked for its nbd driver (generic netlink): {error}"),
        ),
    })
}

/// The error of a process that may not change devices.
pub(super) fn no_rights() -> JobError {
    JobError::new(
        JobErrorKind::Device,
        "kernel devices need administrative rights (CAP_SYS_ADMIN): run this as root, outside of an \
         unprivileged container",
    )
}

fn may_administer() -> bool {
    rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

fn load() -> Result<(), JobError> {
    let mut last = None;
    for program in MODPROBE {
        let run = Command::new(program).arg("nbd").stdin(Stdio::null()).output();
        let output = match run {
            Ok(output) => output,
            Err(error) => {
                last = Some(format!("modprobe cannot be run: {error}"));
                continue;
            }
        };
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().next().unwrap_or("it gives no reason").trim();
        return Err(no_driver(&printable(said.strip_prefix("modprobe: ").unwrap_or(said))));
    }
    Err(no_driver(&last.unwrap_or_default()))
}

fn no_driver(why: &str) -> JobError {
    JobError::new(
        JobErrorKind::Device,
        format!(
            "this kernel has no driver for NBD devices, and none can be loaded ({why}); install the \
             module 'nbd' of this kernel, or use a kernel with CONFIG_BLK_DEV_NBD"
        ),
    )
}
