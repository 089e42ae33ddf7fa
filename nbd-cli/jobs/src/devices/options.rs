//! What a device is to be, and what the kernel is told of it.

use std::num::NonZeroUsize;
use std::time::Duration;

use nbd_client::{ExportInfo, TransmissionFlags};

use super::netlink::Configuration;
use crate::error::{JobError, JobErrorKind};
use crate::text::printable;

/// The smallest block of the kernel, in bytes.
const MIN_BLOCK: u32 = 512;

/// The longest source that the kernel shows: a file of sysfs has one page.
const MAX_SOURCE_LEN: usize = 4000;

/// Options of a device.
#[derive(Clone, Debug)]
pub struct AttachOptions {
    /// The source, by which the device is recognised later.
    pub source: String,
    /// The device; `None`: the kernel chooses a free one.
    pub device: Option<u32>,
    /// Connections, if the server allows several.
    pub connections: NonZeroUsize,
    /// Refuses writes, even if the server allows them.
    pub read_only: bool,
    /// Size of logical blocks, in bytes. By default the server's minimum, at least 512.
    pub block_size: Option<u64>,
    /// Time after which a request is sent over another connection. With `None`, and one
    /// connection, a slow server has all the time it needs.
    pub timeout: Option<Duration>,
    /// Time for which requests wait for a new connection when all are lost.
    pub reconnect: Duration,
}

/// Translates the properties of an export.
pub(super) fn configure(
    info: &ExportInfo,
    options: &AttachOptions,
) -> Result<Configuration, JobError> {
    let source = printable(&options.source);
    if source.len() > MAX_SOURCE_LEN {
        return Err(JobError::invalid(format!(
            "the source is {} bytes long; the kernel keeps at most {MAX_SOURCE_LEN}",
            source.len()
        )));
    }
    let minimum = info.block_sizes.map_or(MIN_BLOCK, |sizes| sizes.minimum().max(MIN_BLOCK));
    let block_size = options.block_size.unwrap_or(minimum.into());
    let page = u64::try_from(rustix::param::page_size()).unwrap_or(u64::MAX);
    if !block_size.is_power_of_two() || block_size < minimum.into() || block_size > page {
        return Err(JobError::new(
            JobErrorKind::Device,
            format!(
                "a device of '{source}' cannot have blocks of {block_size} bytes: the server asks for \
                 at least {minimum}, and the kernel allows powers of two from {MIN_BLOCK} to {page}"
            ),
        ));
    }
    if info.size < block_size {
        return Err(JobError::source(format!(
            "'{source}' has {} bytes: too few for a device with blocks of {block_size}",
            info.size
        )));
    }
    let mut flags = info.flags;
    if options.read_only {
        flags |= TransmissionFlags::READ_ONLY;
    }
    Ok(Configuration {
        index: options.device,
        size: info.size - info.size % block_size,
        block_size,
        flags: flags.bits(),
        timeout: options.timeout.map_or(0, whole_seconds),
        dead_connection_timeout: whole_seconds(options.reconnect),
        backend: source,
    })
}

/// The kernel counts in seconds. More than a year is as good as no limit, and fits.
fn whole_seconds(time: Duration) -> u64 {
    const YEAR: u64 = 366 * 24 * 60 * 60;
    time.as_secs().saturating_add(u64::from(time.subsec_nanos() > 0)).min(YEAR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rounded_up_to_seconds() {
        assert_eq!(whole_seconds(Duration::from_millis(1)), 1);
        assert_eq!(whole_seconds(Duration::from_secs(7)), 7);
        assert_eq!(whole_seconds(Duration::MAX), 366 * 86400);
    }
}
