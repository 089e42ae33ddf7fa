//! Common parts of the serving front ends: values of options, and serving until a signal.

pub(crate) mod background;
mod descriptors;
mod device;
mod durability;
mod filter_args;
mod pid_file;
pub(crate) mod service_manager;

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use nbd_jobs::serving::{ServeOptions, Writes};
use nbd_jobs::tasks;
use nbd_server::{ServeError, Server};

pub(crate) use self::descriptors::allow_descriptors;
pub(crate) use self::device::keep_device;
pub use self::durability::BitmapDurability;
pub use self::filter_args::{Aio, CacheMode, DetectZeroes, Discard, FilterArgs};
pub(crate) use self::pid_file::PidFile;
use crate::error::CommandError;
use crate::shown::warnings;
use crate::signals::{self, EndSignals};

/// Returns the directory of temporary files that the environment names.
pub(crate) fn temporary_directory() -> Option<PathBuf> {
    std::env::var_os("TMPDIR").map(PathBuf::from)
}

/// Returns the options for opening an image, for a read-only or temporary export.
pub(crate) fn serve_options(read_only: bool, temporary: bool) -> ServeOptions {
    let mut options = ServeOptions::default();
    options.context.observer = warnings();
    options.temporary_directory = temporary_directory();
    options.writes = match (temporary, read_only) {
        (true, _) => Writes::ToTemporaryFile,
        (false, true) => Writes::Refused,
        (false, false) => Writes::ToImage,
    };
    options
}

/// Runs a server front end: one thread that accepts and waits for signals, because connections have
/// threads of their own.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, CommandError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CommandError::new(format!("cannot start serving: {error}")))
}

/// The least time for a source's server to answer a request when the program ends.
const LEAST_PATIENCE: Duration = Duration::from_secs(5);

/// Called when serving ends. From then on a request to the server of a source, which may be a layer
/// of an image, is given up if it takes too long: what hangs must keep neither the process nor the
/// other exports from their end. By default that is a minute: a flush may take long, and a service
/// manager kills a server after one and a half.
pub(crate) fn give_up_silent_sources(drain_timeout: Duration) {
    let patience = drain_timeout.saturating_mul(6).max(LEAST_PATIENCE);
    let reason = "the program ends, and the server of this source or layer does not answer";
    signals::interrupter().limit_calls(patience, reason);
}

/// Serves until the first signal, or until `ended` is ready; a second signal ends the process at
/// once.
pub(crate) async fn serve_until_signal(
    server: Server,
    drain_timeout: Duration,
    mut signals: EndSignals,
    ended: impl Future<Output = ()>,
) -> Result<(), CommandError> {
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    tasks::spawn(async move {
        signals.next().await;
        let _ = stop.send(());
        // A second signal ends the process without waiting for slow clients.
        std::process::exit(signals.insisted().await.exit_status().into());
    });
    let stop = async {
        tokio::select! {
            _ = stopped => {}
            () = ended => {}
        }
        service_manager::stopping();
    };
    drain(server, drain_timeout, stop).await
}

/// Serves until `stop` is ready, then completes the requests in flight.
pub(crate) async fn drain(
    server: Server,
    drain_timeout: Duration,
    stop: impl Future<Output = ()>,
) -> Result<(), CommandError> {
    let stop = async {
        stop.await;
        give_up_silent_sources(drain_timeout);
    };
    server.serve(stop).await.map_err(serve_error)
}

/// Converts an error of the server into one of the program.
#[allow(clippy::needless_pass_by_value)] // For map_err.
pub(crate) fn serve_error(error: ServeError) -> CommandError {
    CommandError::new(error.to_string())
}
