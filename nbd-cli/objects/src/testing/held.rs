//! Replies that wait for a test.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// The replies that are held.
#[derive(Debug, Default)]
pub(super) struct Held {
    count: AtomicUsize,
    released: Notify,
}

impl Held {
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    pub(super) fn release(&self) {
        self.released.notify_waiters();
    }

    /// Waits for the release. The client may go away meanwhile.
    pub(super) async fn wait(&self) {
        struct Counted<'a>(&'a AtomicUsize);
        impl Drop for Counted<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        // It is released from here on.
        let released = self.released.notified();
        self.count.fetch_add(1, Ordering::SeqCst);
        let _counted = Counted(&self.count);
        released.await;
    }
}
