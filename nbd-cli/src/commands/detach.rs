//! `nbd-cli detach`: disconnect a kernel device.

use std::pin::pin;
use std::time::Duration;

use clap::Args;
use nbd_jobs::devices::{DetachMode, Detached, detach, parse_device};
use nbd_jobs::tasks;

use crate::async_runtime::runtime;
use crate::error::{CommandError, Outcome};
use crate::output::warn;

const AFTER_HELP: &str = "\
Examples:
  umount /mnt && nbd-cli detach /dev/nbd0

The device is flushed first. When the command returns, the device is free, and the process that kept
it has closed its image. Devices that other programs have attached can be detached as well.";

/// Arguments of `nbd-cli detach`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct DetachArgs {
    /// The device, such as /dev/nbd0.
    #[arg(value_name = "DEVICE", value_parser = parse_device)]
    pub device: u32,

    /// Detach the device even if it is mounted or its server cannot be reached. Unwritten data is
    /// lost. A device in use becomes free when its user closes it; the command does not wait for
    /// that.
    #[arg(long)]
    pub force: bool,
}

/// Time after which the user learns what the command waits for.
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) fn run(args: &DetachArgs) -> Result<Outcome, CommandError> {
    let device = args.device;
    let mode = if args.force { DetachMode::Force } else { DetachMode::WhenUnused };
    let detached = tasks::block_on(&runtime()?, async {
        let mut detaching = pin!(detach(device, mode));
        if let Ok(detached) = tokio::time::timeout(PATIENCE, detaching.as_mut()).await {
            return detached;
        }
        // Not even a signal ends a flush in the kernel.
        warn(&format!(
            "/dev/nbd{device} is still being flushed or closed: its server may not answer; bring the \
             server back, or run `nbd-cli detach --force /dev/nbd{device}` in another terminal and \
             lose what was not written"
        ));
        detaching.await
    });
    if let Detached::InUse(user) = detached? {
        warn(&format!(
            "/dev/nbd{device} is detached from its source, but {user}: it becomes free after that"
        ));
    }
    Ok(Outcome::Success)
}
