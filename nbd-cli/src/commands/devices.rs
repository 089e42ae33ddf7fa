//! `nbd-cli devices`: list kernel devices.

use clap::Args;
use nbd_jobs::devices::{AttachedDevice, attached_devices, kernel_has_devices};
use nbd_jobs::size::rounded;
use serde::Serialize;

use crate::error::{CommandError, Outcome};
use crate::output::{Output, ReportFormat, printable, warn};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli devices
  nbd-cli devices --json | jq -r '.[] | select(.pid == null) | .device'

The columns are the device, its size, whether it can be written (rw or ro), its connections, the
process that restores lost ones, and the source. A '-' stands for what is not known: devices that
other programs have attached have no connections and source here.";

/// Arguments of `nbd-cli devices`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct DevicesArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonDevice<'a> {
    index: u32,
    device: String,
    size: u64,
    block_size: Option<u64>,
    read_only: bool,
    source: Option<&'a str>,
    connections: Option<usize>,
    pid: Option<u32>,
    /// The reason why it cannot be detached.
    in_use: Option<&'a str>,
}

pub(crate) fn run(args: &DevicesArgs) -> Result<Outcome, CommandError> {
    let devices = attached_devices();
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json => {
            output.json(&devices.iter().map(JsonDevice::from).collect::<Vec<_>>())?;
        }
        ReportFormat::Text => {
            if !kernel_has_devices() {
                warn("the kernel's nbd driver is not loaded; `nbd-cli attach` loads it");
            }
            for device in &devices {
                output.line(&line(device))?;
            }
        }
    }
    output.finish()?;
    Ok(Outcome::Success)
}

fn line(device: &AttachedDevice) -> String {
    fn or_dash(value: Option<impl ToString>) -> String {
        value.map_or_else(|| "-".to_owned(), |value| value.to_string())
    }
    format!(
        "{:<11} {:>10}  {}  {:>2}  {:>7}  {}",
        device.path.display(),
        rounded(device.size),
        if device.read_only { "ro" } else { "rw" },
        or_dash(device.connections),
        or_dash(device.pid),
        device.source.as_deref().map_or_else(|| "-".to_owned(), printable),
    )
}

impl<'a> From<&'a AttachedDevice> for JsonDevice<'a> {
    fn from(device: &'a AttachedDevice) -> Self {
        Self {
            index: device.index,
            device: device.path.display().to_string(),
            size: device.size,
            block_size: device.block_size,
            read_only: device.read_only,
            source: device.source.as_deref(),
            connections: device.connections,
            pid: device.pid,
            in_use: device.user.as_deref(),
        }
    }
}
