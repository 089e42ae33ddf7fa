//! Connections between two requests.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::connection::{Connection, Origin};

/// How long a connection is kept. Servers close theirs after 5 s and more.
const KEPT: Duration = Duration::from_secs(20);

/// Connections that are kept for a server.
const KEPT_MAX: usize = 16;

/// The unused connections.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<HashMap<Origin, Vec<(Connection, Instant)>>>);

impl Pool {
    /// Returns the connection that was used last.
    pub(super) fn take(&self, origin: &Origin) -> Option<Connection> {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = pool.get_mut(origin)?;
        while let Some((connection, since)) = kept.pop() {
            if since.elapsed() < KEPT && !connection.is_closed() {
                return Some(connection);
            }
        }
        None
    }

    /// Keeps a connection whose reply has been read completely.
    pub(super) fn put(&self, origin: Origin, connection: Connection) {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = pool.entry(origin).or_default();
        kept.retain(|(connection, since)| since.elapsed() < KEPT && !connection.is_closed());
        if kept.len() < KEPT_MAX {
            kept.push((connection, Instant::now()));
        }
    }
}
