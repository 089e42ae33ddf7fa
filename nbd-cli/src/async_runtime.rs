//! The runtime of the commands that use the network.

use nbd_jobs::tasks;

use crate::error::CommandError;
use crate::signals;

/// Runs the work of a command that writes.
pub(crate) fn block_on<T>(
    work: impl Future<Output = Result<T, CommandError>>,
) -> Result<T, CommandError> {
    let runtime = runtime()?;
    let result = tasks::block_on(&runtime, work);
    if signals::caught().is_some() {
        // A hanging read or write must not prevent an interrupted command from ending.
        runtime.shutdown_background();
    }
    result
}

/// Creates the runtime of the commands that use the network.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, CommandError> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("nbd-cli")
        .build()
        .map_err(|error| CommandError::new(format!("cannot start the runtime's threads: {error}")))
}
