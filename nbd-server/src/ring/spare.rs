//! Memory of short reads and writes that are over, for the next ones.

/// The length of a spare buffer, in bytes: 4 KiB with a header, and as much again for the
/// alignment.
const LENGTH: usize = 12 << 10;
/// Buffers kept: as many as a connection has reads under way.
const MOST: usize = 64;

/// Buffers that were used before, maybe for another client: of each, only what was written since is
/// sent or stored.
#[derive(Debug, Default)]
pub(super) struct Spare(Vec<Vec<u8>>);

impl Spare {
    /// A buffer of at least `length` bytes, with any content.
    pub(super) fn take(&mut self, length: usize) -> Vec<u8> {
        if length > LENGTH {
            return vec![0; length];
        }
        self.0.pop().unwrap_or_else(|| vec![0; LENGTH])
    }

    /// Whether a buffer can be used again.
    pub(super) const fn takes(buffer: &[u8]) -> bool {
        buffer.len() == LENGTH
    }

    /// Keeps a buffer for later, if it is one of those.
    pub(super) fn give_back(&mut self, buffer: Vec<u8>) {
        if Self::takes(&buffer) && self.0.len() < MOST {
            self.0.push(buffer);
        }
    }

    /// Frees all.
    pub(super) fn clear(&mut self) {
        self.0 = Vec::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_short_requests_are_used_again_and_are_bounded_in_number_and_size() {
        let mut spare = Spare::default();
        let buffer = spare.take(5000);
        let place = buffer.as_ptr().addr();
        spare.give_back(buffer);
        let again = spare.take(LENGTH);
        assert_eq!(again.as_ptr().addr(), place);
        let long = spare.take(LENGTH + 1);
        assert_eq!(long.len(), LENGTH + 1);
        spare.give_back(long);
        (0..2 * MOST).for_each(|_| spare.give_back(vec![0; LENGTH]));
        assert_eq!(spare.0.len(), MOST);
        spare.clear();
        assert_eq!(spare.0.capacity(), 0);
    }
}
