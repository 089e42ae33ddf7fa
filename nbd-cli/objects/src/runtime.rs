//! The runtime of the requests.

use std::io;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};

/// Threads that drive requests. TLS and signatures are their only work.
const THREADS: usize = 2;

/// How often a wait looks whether the caller was interrupted.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(100);

static RUNTIME: Mutex<Option<Runtime>> = Mutex::new(None);

/// Hides the type of a future: for each type that is spawned, the runtime has some kilobytes of
/// code.
pub(crate) fn boxed<T>(
    future: impl Future<Output = T> + Send + 'static,
) -> Pin<Box<dyn Future<Output = T> + Send>> {
    Box::pin(future)
}

/// Returns the runtime on which all requests of this process run, and starts its threads at the
/// first call.
///
/// Callers without a runtime, such as the methods of a storage, hand their requests to it; its
/// threads never run their code.
///
/// # Errors
///
/// If threads cannot be started.
pub fn runtime() -> io::Result<Handle> {
    let mut runtime = RUNTIME.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(runtime) = &*runtime {
        return Ok(runtime.handle().clone());
    }
    let mut builder = Builder::new_multi_thread();
    let started = builder.worker_threads(THREADS).thread_name("objects").enable_all().build()?;
    Ok(runtime.insert(started).handle().clone())
}
