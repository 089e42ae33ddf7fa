//! Keeping a kernel device until a signal.

use nbd_jobs::devices::Attached;

use super::service_manager;
use crate::error::CommandError;
use crate::output::warn;
use crate::signals::EndSignals;

/// Keeps a device until another program disconnects it, or until the first signal: then it is
/// flushed and detached. A device in use stays attached, so that another process can adopt it. A
/// second signal ends the process at once.
///
/// # Errors
///
/// If connections can no longer be restored, or if data may not be durable.
pub(crate) async fn keep_device(
    mut attached: Attached,
    signals: &mut EndSignals,
) -> Result<(), CommandError> {
    let kept = tokio::select! {
        kept = attached.keep() => Some(kept),
        _ = signals.next() => None,
    };
    service_manager::stopping();
    let ending = async {
        let detached = match &kept {
            Some(_) => Ok(()),
            None => attached.detach().await,
        };
        if let Err(error) = detached {
            let consequence = match attached.needs_process() {
                true => "its requests wait for a process that attaches the same source to it again",
                false => {
                    "lost connections are not restored until a process attaches the same source to it again"
                }
            };
            warn(&format!("{error}; it stays attached, and {consequence}"));
        }
        let closed = attached.close().await;
        kept.unwrap_or(Ok(())).and(closed)
    };
    let ended = tokio::select! {
        ended = ending => ended,
        second = signals.insisted() => std::process::exit(second.exit_status().into()),
    };
    Ok(ended?)
}
