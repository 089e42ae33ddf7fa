//! Notifications to a service manager (sd_notify): ready, reloading, stopping, and the watchdog.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::OnceLock;
use std::time::Duration;

use nbd_jobs::takeover::ServiceManager;
use nbd_jobs::tasks;
use sd_notify::NotifyState;

/// That of the server from which this one has taken over.
static ADOPTED: OnceLock<ServiceManager> = OnceLock::new();

/// Returns the service manager, if there is one.
pub(crate) fn current() -> Option<ServiceManager> {
    let adopted = ADOPTED.get();
    let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
        return adopted.cloned();
    };
    // The watchdog is only in the environment of the first process of a service.
    let same = adopted.filter(|manager| manager.notify_socket == name);
    let watchdog = sd_notify::watchdog_enabled().or_else(|| same?.watchdog);
    Some(ServiceManager::new(name, watchdog))
}

/// Returns whether the environment names sockets for this process.
pub(crate) fn gave_sockets() -> bool {
    let own = std::process::id().to_string();
    std::env::var("LISTEN_PID").is_ok_and(|pid| pid.trim() == own)
        && std::env::var_os("LISTEN_FDS").is_some()
}

/// The service manager of the server from which this one takes over, unless this one has its own.
pub(crate) fn adopt(manager: ServiceManager) {
    // There is one takeover in the life of a program.
    let _ = ADOPTED.set(manager);
}

/// Reports that clients can connect. From now on the watchdog of the service manager, if it has
/// one, is notified while the thread that accepts clients works. Call it in a tokio runtime.
pub(crate) fn ready() {
    tell(&[NotifyState::Ready]);
    // Thrice in each period: what the successor of a server says first may come before the service
    // manager knows of it, and is not heard then.
    let limit = current().and_then(|manager| manager.watchdog);
    let Some(period) = limit.map(|limit| limit / 3) else { return };
    tasks::spawn(async move {
        loop {
            tell(&[NotifyState::Watchdog]);
            tokio::time::sleep(period.max(Duration::from_millis(1))).await;
        }
    });
}

/// Reports that the server reads its files again, until [`reloaded`].
pub(crate) fn reloading() {
    // Without the time, a service of type notify-reload ignores the notification.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(_) => tell(&[NotifyState::Reloading]),
    }
}

/// Reports the main process of the service.
pub(crate) fn main_process(process: u32) {
    tell(&[NotifyState::MainPid(process)]);
}

/// Reports the end of [`reloading`].
pub(crate) fn reloaded() {
    tell(&[NotifyState::Ready]);
}

/// Reports that the server ends: it completes requests and flushes.
pub(crate) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Sends notifications. A missing or unresponsive service manager is not an error.
fn tell(states: &[NotifyState<'_>]) {
    let Some(manager) = current() else { return };
    if let Err(error) = send(&manager.notify_socket, states) {
        tracing::debug!(%error, "cannot notify the service manager");
    }
}

fn send(name: &OsStr, states: &[NotifyState<'_>]) -> io::Result<()> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let text: String = states.iter().map(|state| format!("{state}\n")).collect();
    UnixDatagram::unbound()?.send_to_addr(text.as_bytes(), &address).map(drop)
}
