//! `-c` and `-d`: the image as a kernel device (`/dev/nbdX`).

use std::sync::Arc;
use std::time::Duration;

use nbd_jobs::devices::{
    AttachOptions, Attached, Backend, DetachMode, attached_devices, detach, ensure_driver,
    parse_device,
};
use nbd_jobs::qemu_nbd::{AioMode, Options};
use nbd_jobs::tasks;
use nbd_server::ServerConfig;
use nbd_server::export::Export;

use super::daemon::{self, Role};
use super::refusal::{Refusal, complain, print};
use super::source;
use crate::error::CommandError;
use crate::serving::{Aio, PidFile, keep_device, runtime};
use crate::signals::{EndSignals, Hangup};

/// `-c DEVICE FILE`.
pub(super) fn connect(options: &Options, device: &str, role: Role) -> Result<(), Refusal> {
    let index = parse_device(device).map_err(Refusal::new)?;
    ensure_driver().map_err(CommandError::from)?;
    let runtime = runtime()?;
    let mut signals = tasks::block_on(&runtime, async { EndSignals::new(Hangup::Ends) })?;
    // An image on another server blocks: it is opened, and finally dropped, outside of tasks.
    let export = std::thread::scope(|scope| {
        let (done, opened) = tokio::sync::oneshot::channel();
        scope.spawn(move || done.send(source::open(options)));
        tasks::block_on(&runtime, signals.meanwhile(opened))
    });
    let export = export.map_err(|_| Refusal::new("opening the image has ended unexpectedly"))??;
    let kept =
        tasks::block_on(&runtime, serve(options, index, role, Arc::clone(&export), &mut signals));
    drop(export);
    drop(runtime);
    kept
}

async fn serve(
    options: &Options,
    index: u32,
    role: Role,
    export: Arc<dyn Export>,
    signals: &mut EndSignals,
) -> Result<(), Refusal> {
    PidFile::write_and_keep(options.pid_file.as_deref())?;
    let mut config = ServerConfig::default();
    let aio = if options.aio == Some(AioMode::Threads) { Aio::Threads } else { Aio::Auto };
    config.io_uring = aio.may_use_io_uring();
    let backend = Backend::of_export(export, config).await.map_err(CommandError::from)?;
    let properties = properties(options, index);
    let attached =
        signals.meanwhile(Attached::new(backend, &properties)).await.map_err(CommandError::from)?;
    if options.verbose {
        complain(&format!("{} is attached", attached.path().display()));
    }
    daemon::ready(role, options)?;
    Ok(keep_device(attached, signals).await?)
}

fn properties(options: &Options, index: u32) -> AttachOptions {
    let file = options.files.first().map_or_else(String::new, |file| file.display().to_string());
    // A unique text: options such as -o and -l change the content of the disk.
    let source = format!("{file} (qemu-nbd, process {})", std::process::id());
    let mut properties = AttachOptions::new(source);
    properties.device = Some(index);
    properties.read_only = options.read_only;
    // As with QEMU's, requests fail when the process has ended.
    properties.reconnect = Duration::ZERO;
    properties
}

/// `-d DEVICE`. A device that is not connected is not an error, because scripts disconnect devices
/// to be sure.
pub(super) fn disconnect(options: &Options) -> Result<(), Refusal> {
    let device = options.files.first().map_or_else(String::new, |file| file.display().to_string());
    let index = parse_device(&device).map_err(Refusal::new)?;
    if attached_devices().iter().any(|attached| attached.index == index) {
        let detached = tasks::block_on(&runtime()?, detach(index, DetachMode::WhenUnused));
        detached.map_err(CommandError::from)?;
    } else if !std::path::Path::new(&format!("/sys/block/nbd{index}")).exists() {
        return Err(Refusal::new(format!("{device}: this kernel has no such device")));
    }
    print(&format!("{device} disconnected\n"))
}
