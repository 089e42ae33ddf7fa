//! Bytes received and not yet consumed.

/// Initial size, in bytes. Idle clients keep it.
const SMALL_LEN: usize = 16 * 1024;
/// Size of the buffer of a busy client, in bytes: for a request with the longest payload that is
/// received here.
const MEDIUM_LEN: usize = 80 * 1024;
/// Size of the same if there is [memory](super::room), in bytes: for a deep queue of small writes
/// in one read.
pub(super) const LARGE_LEN: usize = 256 * 1024;
/// Maximum size of a read while large payloads arrive, in bytes. Enough for the headers between
/// them; most of the payload is then read directly into its own buffer.
const READ_LEN_BESIDE_LARGE_PAYLOADS: usize = 16 * 1024;

/// A buffer with a consumed, a filled and an empty part.
#[derive(Debug)]
pub(super) struct ReceiveBuffer {
    data: Vec<u8>,
    start: usize,
    end: usize,
    read_len: usize,
    total: u64,
    /// Whether the last read has filled the buffer.
    is_tight: bool,
}

impl ReceiveBuffer {
    /// A buffer that begins with `received`.
    pub(super) fn new(received: &[u8]) -> Self {
        // There is always space to read into.
        let length = if received.len() < SMALL_LEN { 0 } else { received.len() + MEDIUM_LEN };
        let mut data = vec![0; length.max(SMALL_LEN)];
        data[..received.len()].copy_from_slice(received);
        Self { data, start: 0, end: received.len(), read_len: LARGE_LEN, total: 0, is_tight: false }
    }

    /// The received bytes that were not consumed.
    pub(super) fn filled(&self) -> &[u8] {
        &self.data[self.start..self.end]
    }

    /// Drops `count` bytes from the front.
    pub(super) fn consume(&mut self, count: usize) {
        debug_assert!(count <= self.end - self.start, "only what was received can be consumed");
        self.start += count;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Space to read into. Never empty while less than [`MEDIUM_LEN`] bytes are waiting.
    pub(super) fn space(&mut self) -> &mut [u8] {
        if self.start > 0 && self.data.len() - self.end < self.data.len() / 2 {
            self.data.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let end = self.data.len().min(self.end.saturating_add(self.read_len));
        &mut self.data[self.end..end]
    }

    /// Records that `count` bytes were read into [`ReceiveBuffer::space`]. A read that filled the
    /// buffer makes it grow.
    pub(super) fn received(&mut self, count: usize) {
        self.end += count;
        self.total = self.total.wrapping_add(count as u64);
        debug_assert!(self.end <= self.data.len(), "reads end in the buffer");
        self.is_tight = self.end == self.data.len();
        if self.is_tight && self.data.len() < MEDIUM_LEN {
            self.data.resize(MEDIUM_LEN, 0);
        }
    }

    /// Whether the last read has filled the buffer, so that a larger one would be useful.
    pub(super) fn wants_room(&self) -> bool {
        self.is_tight && self.data.len() < LARGE_LEN
    }

    /// Grows the buffer to its maximum.
    pub(super) fn grow(&mut self) {
        if self.data.len() < LARGE_LEN {
            self.data.resize(LARGE_LEN, 0);
        }
    }

    /// Makes it small again, if it is empty.
    pub(super) fn shrink(&mut self) {
        if self.start == self.end && self.data.len() > MEDIUM_LEN {
            self.data = vec![0; SMALL_LEN];
            (self.start, self.end) = (0, 0);
        }
    }

    /// The total of bytes that were read into this, modulo 2^64.
    pub(super) const fn total(&self) -> u64 {
        self.total
    }

    /// Sets the length of the last payload, in bytes, so that reads can be limited to suit the
    /// next.
    pub(super) fn expect_payloads_like(&mut self, length: usize) {
        self.read_len =
            if length > LARGE_LEN / 4 { READ_LEN_BESIDE_LARGE_PAYLOADS } else { LARGE_LEN };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_as_they_went_in_across_growth_and_moves() {
        let mut buffer = ReceiveBuffer::new(b"left over");
        let mut expected: Vec<u8> = b"left over".to_vec();
        let mut next = 0_u8;
        for step in 1..2000_usize {
            let space = buffer.space();
            assert!(!space.is_empty());
            let count = space.len().min(step * 7 % 5000 + 1);
            for byte in &mut space[..count] {
                *byte = next;
                expected.push(next);
                next = next.wrapping_add(1);
            }
            buffer.received(count);
            let take = buffer.filled().len() * (step % 4 + 1) / 4;
            assert_eq!(buffer.filled()[..take], expected[..take]);
            buffer.consume(take);
            expected.drain(..take);
        }
    }

    #[test]
    fn the_buffer_grows_for_a_client_that_fills_it() {
        let mut buffer = ReceiveBuffer::new(&[]);
        assert_eq!(buffer.space().len(), SMALL_LEN);
        buffer.received(SMALL_LEN);
        assert_eq!(buffer.space().len(), MEDIUM_LEN - SMALL_LEN);
        buffer.consume(SMALL_LEN);
        assert!(buffer.wants_room());
        buffer.grow();
        assert_eq!(buffer.space().len(), LARGE_LEN);
        buffer.received(10);
        buffer.shrink();
        assert_eq!(buffer.filled().len(), 10, "what is in use stays");
        buffer.consume(10);
        buffer.shrink();
        assert_eq!(buffer.space().len(), SMALL_LEN);
        assert!(!buffer.wants_room());
    }
}
