//! Giving connections to a device of the kernel.

use std::os::fd::OwnedFd;

use nbd_client::TransmissionFlags;
use rustix::io::Errno;

use super::backend::Backend;
use super::load::{driver, no_rights};
use super::netlink::{Announcements, Configuration, Driver};
use super::options::{AttachOptions, configure};
use super::record::{Note, Record};
use super::sysfs::SysDevice;
use super::{device_error, path_of};
use crate::error::{JobError, JobErrorKind};
use crate::text::printable;

/// A device that has its connections.
pub(super) struct Given {
    pub(super) index: u32,
    pub(super) driver: Driver,
    pub(super) announcements: Announcements,
    pub(super) configuration: Configuration,
    pub(super) connections: usize,
    pub(super) record: Record,
    pub(super) is_adopted: bool,
}

/// Gives connections to a device.
pub(super) async fn given_to_kernel(
    backend: &mut Backend,
    options: &AttachOptions,
) -> Result<Given, JobError> {
    let mut driver = driver()?;
    let configuration = configure(backend.info(), options)?;
    let announcements = driver.announcements().map_err(|error| {
        JobError::new(JobErrorKind::Device, format!("the kernel announces nothing: {error}"))
    })?;
    let record = options.device.map(Record::take).transpose()?;
    let former = options.device.map(SysDevice::new).filter(SysDevice::is_connected);
    if let Some(former) = &former {
        check_same(former, &configuration)?;
    }
    let sockets = connections(backend, options).await?;
    let given = match &former {
        Some(device) => {
            let index = device.index();
            // One, so that no other is made for nothing.
            driver.reconfigure(index, &configuration, &sockets[..1]).map(|()| index)
        }
        None => driver.connect(&configuration, &sockets),
    };
    let index = given.map_err(|error| explained(&error, options.device, &configuration))?;
    let connections = sockets.len();
    let record = match note(record, index, connections) {
        Ok(record) => record,
        Err(error) => {
            if former.is_none() {
                // It is new, and nothing was written to it.
                let _ = driver.disconnect(index);
            }
            return Err(error);
        }
    };
    let is_adopted = former.is_some();
    Ok(Given { index, driver, announcements, configuration, connections, record, is_adopted })
}

/// Notes that this process keeps a device.
fn note(record: Option<Record>, index: u32, connections: usize) -> Result<Record, JobError> {
    let mut record = match record {
        Some(record) => record,
        None => Record::take(index)?,
    };
    let note = Note { pid: std::process::id(), connections };
    let written = record.write(&note);
    written.map_err(|error| device_error(index, format!("cannot note its keeper: {error}")))?;
    Ok(record)
}

/// Makes the first connections: as many as are wanted and the server admits.
async fn connections(
    backend: &mut Backend,
    options: &AttachOptions,
) -> Result<Vec<OwnedFd>, JobError> {
    let may_be_several = backend.info().flags.contains(TransmissionFlags::CAN_MULTI_CONN);
    let wanted = if may_be_several { options.connections.get() } else { 1 };
    let mut sockets = vec![backend.first_connection().await?];
    while sockets.len() < wanted {
        match backend.connection().await {
            Ok(socket) => sockets.push(socket),
            Err(error) => {
                let admitted = sockets.len();
                tracing::warn!(admitted, wanted, %error, "the server admits fewer connections");
                break;
            }
        }
    }
    Ok(sockets)
}

/// Refuses a device that is attached to something else.
fn check_same(device: &SysDevice, configuration: &Configuration) -> Result<(), JobError> {
    let index = device.index();
    match device.backend() {
        Some(backend) if backend == configuration.backend => {}
        Some(backend) => {
            let backend = printable(&backend);
            return Err(device_error(
                index,
                format!(
                    "'{backend}' is attached to it; detach it first, or leave the device out to get a free one"
                ),
            ));
        }
        None => {
            return Err(device_error(
                index,
                "another program has attached it; detach it first, or leave the device out to get a free one",
            ));
        }
    }
    if device.is_read_only() != configuration.is_read_only() {
        let now = if device.is_read_only() {
            "read-only, and its source is not"
        } else {
            "writable, and its source is not"
        };
        return Err(device_error(index, format!("it is {now}; detach it first")));
    }
    if device.size() != configuration.size {
        return Err(device_error(
            index,
            format!(
                "it has {} bytes, and its source has {} now; detach it first",
                device.size(),
                configuration.size
            ),
        ));
    }
    Ok(())
}

/// Explains a refusal of the kernel.
pub(super) fn explained(
    error: &std::io::Error,
    device: Option<u32>,
    configuration: &Configuration,
) -> JobError {
    let device =
        device.map_or_else(|| "a device".to_owned(), |index| path_of(index).display().to_string());
    let why = match Errno::from_io_error(error) {
        Some(Errno::PERM) => return no_rights(),
        Some(Errno::BUSY) => "it is in use".to_owned(),
        Some(Errno::INVAL) => format!(
            "the kernel refuses {} bytes in blocks of {} ({error}); Linux 5.14 or newer is needed",
            configuration.size, configuration.block_size
        ),
        _ => error.to_string(),
    };
    JobError::new(
        JobErrorKind::Device,
        format!("cannot attach '{}' to {device}: {why}", configuration.backend),
    )
}
