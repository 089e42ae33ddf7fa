//! Portions of a batch of READs, which are sent while the rest is read.
//!
//! A client that has many requests in flight sends the next ones when it receives replies. If all
//! replies of a batch left together, the client would wait while the server reads, and the server
//! while the client receives. So the replies of a long batch leave in a few portions. A small one
//! costs a system call and a wakeup for few replies, so portions grow with the batch.

/// Replies in the smallest portion.
const LEAST: usize = 4;
/// Replies in the largest portion.
const MOST: usize = 16;
/// The part of the batch that a portion is.
const PART: usize = 4;

/// The READs of the present batch that were answered at once.
#[derive(Debug, Default)]
pub(super) struct Portion {
    answered: usize,
    unsent: usize,
}

impl Portion {
    /// Counts an answered READ.
    pub(super) fn add(&mut self) {
        self.answered += 1;
        self.unsent += 1;
    }

    /// Whether the replies that wait are enough to be sent before the next READ. If so, the next
    /// portion begins.
    pub(super) fn take(&mut self) -> bool {
        let is_complete = self.unsent >= (self.answered / PART).clamp(LEAST, MOST);
        if is_complete {
            self.unsent = 0;
        }
        is_complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The replies after which something is sent.
    fn sent_after(batch: usize) -> Vec<usize> {
        let mut portion = Portion::default();
        let is_sent = |_: &usize| {
            portion.add();
            portion.take()
        };
        (1..=batch).filter(is_sent).collect()
    }

    #[test]
    fn portions_grow_with_the_batch() {
        assert!(sent_after(3).is_empty());
        assert_eq!(sent_after(16), [4, 8, 12, 16]);
        assert_eq!(sent_after(64), [4, 8, 12, 16, 21, 27, 35, 46, 61]);
    }
}
