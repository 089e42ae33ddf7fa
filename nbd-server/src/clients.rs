//! How many clients have an export in use.

use std::sync::Arc;

use tokio::sync::watch;

/// Clients that have chosen an export, at this moment and in all. A clone counts the same server.
///
/// A client that leaves before it has chosen (a port scan, a question for the list of exports) is
/// never counted.
#[derive(Debug, Clone)]
pub struct ClientCount {
    count: watch::Receiver<Count>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Count {
    present: usize,
    total: u64,
}

impl ClientCount {
    /// Clients that have an export in use now.
    #[must_use]
    pub fn present(&self) -> usize {
        self.count.borrow().present
    }

    /// Clients that have ever had an export in use.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.count.borrow().total
    }

    /// Waits until at least one client has used an export and none does any more. If the server
    /// ends before that, this never returns.
    ///
    /// # Cancel safety
    ///
    /// Safe: nothing is lost, the count is kept by the server.
    pub async fn last_left(&mut self) {
        let left = |count: &Count| count.total > 0 && count.present == 0;
        let server_is_gone = self.count.wait_for(left).await.is_err();
        if server_is_gone {
            std::future::pending::<()>().await;
        }
    }
}

/// The side that counts.
#[derive(Debug, Clone)]
pub(crate) struct Clients {
    count: Arc<watch::Sender<Count>>,
}

impl Clients {
    pub(crate) fn new() -> Self {
        Self { count: Arc::new(watch::Sender::new(Count::default())) }
    }

    pub(crate) fn subscribe(&self) -> ClientCount {
        ClientCount { count: self.count.subscribe() }
    }

    /// Counts a client until the returned value is dropped.
    pub(crate) fn enter(&self) -> PresentClient {
        self.count.send_modify(|count| {
            count.present += 1;
            count.total += 1;
        });
        PresentClient(self.clone())
    }
}

/// One client that is counted.
#[derive(Debug)]
pub(crate) struct PresentClient(Clients);

impl Drop for PresentClient {
    fn drop(&mut self) {
        self.0.count.send_modify(|count| count.present -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_last_one_leaves_when_there_was_one() {
        let clients = Clients::new();
        let mut count = clients.subscribe();
        let first = clients.enter();
        let second = clients.enter();
        assert_eq!((count.present(), count.total()), (2, 2));
        drop(first);
        let waiting = tokio::spawn(async move {
            count.last_left().await;
            (count.present(), count.total())
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished(), "one client is still there");
        drop(second);
        assert_eq!(waiting.await.unwrap(), (0, 2));
    }

    #[tokio::test]
    async fn a_server_nobody_has_used_yet_has_not_been_left() {
        let clients = Clients::new();
        let mut count = clients.subscribe();
        let waiting = tokio::spawn(async move { count.last_left().await });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(clients.enter());
        waiting.await.unwrap();
    }
}
