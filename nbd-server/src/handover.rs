//! Waits for an address that another server is about to release.
//!
//! A server that is ending still listens for a moment, and its successor is often started in that
//! moment. Therefore an address in use is tried again, and refused if it remains in use.

use std::future::Future;
use std::io;
use std::time::Duration;

use crate::error::ServeError;

/// The first pause between attempts; each is twice the one before. They sum up to about a second.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const ATTEMPTS: u32 = 7;

/// Binds, and tries again while the address is in use and may become free.
pub(crate) async fn take_over<T, F: Future<Output = Result<T, ServeError>>>(
    mut bind: impl FnMut() -> F,
) -> Result<T, ServeError> {
    let mut pause = FIRST_PAUSE;
    for _ in 0..ATTEMPTS {
        match bind().await {
            Err(error) if is_taken(&error) => tokio::time::sleep(pause).await,
            result => return result,
        }
        pause *= 2;
    }
    bind().await
}

fn is_taken(error: &ServeError) -> bool {
    match error {
        ServeError::SocketInUse { .. } => true,
        ServeError::Bind { source, .. } => source.kind() == io::ErrorKind::AddrInUse,
        _ => false,
    }
}
