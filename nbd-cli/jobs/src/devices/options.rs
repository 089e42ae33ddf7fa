//! The options of a device, and their translation for the kernel.

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

/// Options of a device; created by [`new`](Self::new), changed field by field.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AttachOptions {
    /// The source: a text by which the device is recognised later. The kernel keeps at most 4000
    /// bytes.
    pub source: String,
    /// Number of the device. By default the kernel chooses a free one.
    pub device: Option<u32>,
    /// Connections, if the server allows several. By default 1.
    pub connections: NonZeroUsize,
    /// Whether writes are refused even if the server allows them. By default false.
    pub read_only: bool,
    /// Size of logical blocks, in bytes. By default the server's minimum, at least 512.
    pub block_size: Option<u64>,
    /// Time after which a request is sent over another connection, rounded up to seconds. By
    /// default there is no limit.
    pub timeout: Option<Duration>,
    /// Time for which requests wait for a new connection when all are lost, rounded up to seconds.
    /// By default 30 seconds.
    pub reconnect: Duration,
}

impl AttachOptions {
    /// Creates the default options for a source.
    pub fn new(source: impl Into<String>) -> Self {
        Self {
            source: source.into(),
            device: None,
            connections: NonZeroUsize::MIN,
            read_only: false,
            block_size: None,
            timeout: None,
            reconnect: Duration::from_secs(30),
        }
    }
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

/// The kernel counts in seconds. A year is enough, and fits its timers.
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
