//! Notifications to a service manager (sd_notify): ready, reloading, stopping, and the watchdog.

use std::time::Duration;

use sd_notify::NotifyState;

/// Reports that clients can connect. From now on the watchdog of the service manager, if it has
/// one, is notified while the thread that accepts clients works. Call it in a tokio runtime.
pub(crate) fn ready() {
    tell(&[NotifyState::Ready]);
    // Twice in each period, as the documentation of the protocol recommends.
    let Some(period) = sd_notify::watchdog_enabled().map(|limit| limit / 2) else { return };
    tokio::spawn(async move {
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
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "cannot notify the service manager");
    }
}
