//! Attaching a device, and keeping it connected.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, sleep};

use super::backend::Backend;
use super::detach::{DetachMode, disconnect};
use super::given::{Given, explained, given_to_kernel};
use super::load::driver;
use super::netlink::{Announcement, Announcements, Configuration, Driver};
use super::options::AttachOptions;
use super::record::Record;
use super::sysfs::{Attachment, SysDevice};
use super::{device_error, path_of};
use crate::error::JobError;
use crate::tasks;

/// The time between two looks whether the device is still connected.
const LOOK: Duration = Duration::from_secs(1);

/// The longest pause between two attempts to reach a server.
const MAX_PAUSE: Duration = Duration::from_secs(2);
const MIN_PAUSE: Duration = Duration::from_millis(100);

/// An attached device, kept by this process.
#[derive(Debug)]
pub struct Attached {
    index: u32,
    driver: Driver,
    announcements: Announcements,
    backend: Backend,
    configuration: Configuration,
    connections: usize,
    /// Connections that may be dead.
    missing: usize,
    is_adopted: bool,
    /// Distinguishes it from a later attachment of the same device by another process.
    attachment: Option<Attachment>,
    record: Record,
}

impl Attached {
    /// Attaches a backend to a device, or adopts the device if the same source is attached to it.
    ///
    /// # Errors
    ///
    /// If the kernel has no driver, this process lacks the right to use it, the device is in use,
    /// or the kernel cannot use the export.
    ///
    /// # Cancel safety
    ///
    /// The device may be attached; another process can adopt it.
    pub async fn new(mut backend: Backend, options: &AttachOptions) -> Result<Self, JobError> {
        match given_to_kernel(&mut backend, options).await {
            Ok(given) => {
                let attached = Self::of(given, backend);
                attached.prepare();
                Ok(attached)
            }
            Err(error) => {
                // Nothing was written, so this error says more than one of closing.
                let _ = backend.close().await;
                Err(error)
            }
        }
    }

    fn of(given: Given, backend: Backend) -> Self {
        let Given { index, driver, announcements, configuration, connections, record, is_adopted } =
            given;
        if backend.info().size > configuration.size {
            let lost = backend.info().size - configuration.size;
            tracing::warn!(
                device = index,
                lost,
                "the last bytes are not a whole block, and out of reach"
            );
        }
        // Each connection of an adopted device but the one that it was given may be dead.
        let missing = if is_adopted { connections.saturating_sub(1) } else { 0 };
        Self {
            index,
            driver,
            announcements,
            backend,
            configuration,
            connections,
            missing,
            is_adopted,
            attachment: SysDevice::new(index).attachment(),
            record,
        }
    }

    /// Whether the device is still attached as this process has found or made it.
    fn is_ours(&self) -> bool {
        let now = SysDevice::new(self.index).attachment();
        now.is_some() && now == self.attachment
    }

    /// Returns the file of the device.
    pub fn path(&self) -> PathBuf {
        path_of(self.index)
    }

    /// Returns whether the device was attached before, and requests may have waited for this.
    pub fn is_adopted(&self) -> bool {
        self.is_adopted
    }

    /// Returns the number of connections.
    pub fn connections(&self) -> usize {
        self.connections
    }

    /// Returns whether the device works only as long as this process runs.
    pub fn needs_process(&self) -> bool {
        self.backend.needs_process()
    }

    /// Lets the kernel send no larger requests than the server takes, and look for partitions.
    fn prepare(&self) {
        let device = SysDevice::new(self.index);
        if let Some(sizes) = self.backend.info().block_sizes
            && let Err(error) = device.limit_requests(sizes.maximum_payload().into())
        {
            tracing::warn!(%error, "the size of requests cannot be limited to the server's");
        }
        look_for_partitions(self.path());
    }

    /// Restores lost connections until the device is disconnected.
    ///
    /// # Errors
    ///
    /// If the kernel's announcements can no longer be received.
    ///
    /// # Cancel safety
    ///
    /// Safe: it can be called again.
    pub async fn keep(&mut self) -> Result<(), JobError> {
        let device = SysDevice::new(self.index);
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let Self {
            index,
            driver,
            announcements,
            backend,
            configuration,
            connections,
            missing,
            attachment,
            ..
        } = self;
        let index = *index;
        let is_ours = || attachment.is_some() && device.attachment() == *attachment;
        let mut pause = Duration::ZERO;
        let connecting = attempt(backend, pause);
        let mut connecting = Box::pin(connecting);
        loop {
            tokio::select! {
                announcement = announcements.next() => match announcement {
                    Ok(Announcement::Dead(dead)) if dead == index => {
                        tracing::warn!(device = index, "a connection is lost");
                        *missing = missing.saturating_add(1).min(*connections);
                    }
                    Ok(Announcement::Lost) => *missing = *connections,
                    Ok(Announcement::Dead(_)) => {}
                    Err(error) => return Err(device_error(
                        index,
                        format!("the kernel's announcements cannot be received: {error}"),
                    )),
                },
                _ = looks.tick() => if !is_ours() {
                    return Ok(());
                },
                connected = &mut connecting, if *missing > 0 => {
                    // Somebody else's device must not get a connection of ours.
                    if !is_ours() {
                        return Ok(());
                    }
                    pause = match connected.and_then(|socket| {
                        let given = driver.reconfigure(index, configuration, &[socket]);
                        given.map_err(|error| explained(&error, Some(index), configuration))
                    }) {
                        Ok(()) => {
                            *missing -= 1;
                            tracing::info!(device = index, "a connection is restored");
                            Duration::ZERO
                        }
                        Err(error) => {
                            tracing::warn!(device = index, %error, "a connection is not restored yet");
                            (pause * 2).clamp(MIN_PAUSE, MAX_PAUSE)
                        }
                    };
                    connecting = Box::pin(attempt(backend, pause));
                }
            }
        }
    }

    /// Flushes and disconnects the device. Nothing is done if it is no longer the one that was
    /// attached.
    ///
    /// # Errors
    ///
    /// If it is in use or cannot be flushed, or if all connections are lost, so that a flush would
    /// wait for the server: it remains attached.
    ///
    /// # Cancel safety
    ///
    /// The device may or may not be disconnected.
    pub async fn detach(&self) -> Result<(), JobError> {
        let index = self.index;
        if !self.is_ours() {
            return Ok(());
        }
        if self.missing >= self.connections {
            let why = "its server is away, and what was written may not have arrived there";
            return Err(device_error(index, why));
        }
        // It may take long, and an export of this process has to be served meanwhile.
        let detaching = tasks::spawn_blocking(move || {
            disconnect(&mut driver()?, index, DetachMode::WhenUnused)
        });
        detaching.await.map_err(|error| JobError::given_up("detachment", &error))?
    }

    /// Ends this process's part: closes the export, then releases the record. A device that is
    /// attached still waits for another process that adopts it.
    ///
    /// # Errors
    ///
    /// If data may not be durable.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not undo the shutdown; whether data is durable remains unknown.
    pub async fn close(self) -> Result<(), JobError> {
        let Self { index, attachment, backend, record, .. } = self;
        let closed = backend.close().await;
        let is_ours = attachment.is_some() && SysDevice::new(index).attachment() == attachment;
        if !is_ours {
            record.remove();
        }
        closed
    }
}

/// Has the kernel look for partitions, as it does when a device is opened first. Another process
/// opens it: one that waits for a read of a device cannot be killed, and if this process has to
/// answer the read, it would keep its image until the device gives up.
fn look_for_partitions(device: PathBuf) {
    let mut open = Command::new("/bin/sh");
    open.args(["-c", ": < \"$0\""]).arg(device);
    open.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if let Ok(mut opening) = open.spawn() {
        // It is reaped, and nothing waits for that.
        std::thread::spawn(move || opening.wait());
    }
}

/// Makes a connection, after a pause.
async fn attempt(backend: &Backend, pause: Duration) -> Result<OwnedFd, JobError> {
    sleep(pause).await;
    backend.connection().await
}
