//! Sequential readers, and how far to read ahead for each.

use std::ops::Range;

/// Most blocks that are read ahead: 32 MiB.
pub(super) const AHEAD_MAX: u64 = 128;

/// Blocks of one request: 8 MiB, as stores cut large objects. Longer ranges are several requests.
pub(super) const RUN_MAX: u64 = 32;

/// Sequential readers that are remembered. Each client of a server may be one.
const SEQUENCES_MAX: usize = 16;

/// The readers of one object, the latest last.
#[derive(Debug, Default)]
pub(super) struct Sequences(Vec<Sequence>);

#[derive(Clone, Copy, Debug)]
struct Sequence {
    /// The block after the last one that was read.
    next: u64,
    /// Blocks to be read ahead.
    window: u64,
    /// The end of what was read ahead.
    ahead: u64,
}

impl Sequence {
    /// Whether a read is of this reader. Several tasks read in any order within the window.
    fn has(&self, start: u64) -> bool {
        let behind = self.window.max(1);
        (self.next.saturating_sub(behind)..=self.ahead.max(self.next)).contains(&start)
    }
}

impl Sequences {
    /// Records a read of blocks, and returns the blocks behind them to be read ahead: at most
    /// `longest`. `count` is the number of blocks of the object.
    pub(super) fn read(&mut self, read: Range<u64>, count: u64, longest: u64) -> Range<u64> {
        let Some(index) = self.0.iter().rposition(|sequence| sequence.has(read.start)) else {
            if self.0.len() == SEQUENCES_MAX {
                self.0.remove(0);
            }
            self.0.push(Sequence { next: read.end, window: 0, ahead: read.end });
            return read.end..read.end;
        };
        let mut sequence = self.0.remove(index);
        if read.end > sequence.next {
            sequence.window = (sequence.window * 2).max(1).min(longest);
            sequence.next = read.end;
        }
        let begun = sequence.ahead.max(sequence.next);
        let limit = sequence.next.saturating_add(sequence.window).min(count);
        // A quarter at a time: several requests are on their way, and each is long.
        let least = sequence.window.div_ceil(4).min(RUN_MAX);
        // Long ones begin and end where stores cut objects.
        let is_even = least == RUN_MAX && limit < count;
        let wanted = if is_even { limit - limit % RUN_MAX } else { limit };
        let is_due = wanted >= begun + least || (wanted == count && wanted > begun);
        sequence.ahead = if is_due { wanted } else { begun };
        self.0.push(sequence);
        if is_due { begun..wanted } else { read.end..read.end }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_doubles_up_to_its_limit_while_reads_are_sequential() {
        for limit in [16, AHEAD_MAX] {
            let mut sequences = Sequences::default();
            let (mut most, mut shortest) = (0, u64::MAX);
            let mut end = 0;
            for block in 0..900 {
                let ahead = sequences.read(block..block + 1, 1000, limit);
                if !ahead.is_empty() {
                    assert!(ahead.start > block && ahead.start >= end, "twice: {ahead:?}");
                    assert!(ahead.end <= block + 1 + limit);
                    most = most.max(ahead.end - block - 1);
                    end = ahead.end;
                    if block > 300 && end < 1000 {
                        shortest = shortest.min(ahead.end - ahead.start);
                    }
                }
                // Several requests are on their way at any time.
                assert!(block < 300 || end >= block + limit / 2);
            }
            assert!(most > limit - RUN_MAX.min(limit / 2), "{most}");
            assert_eq!(shortest, RUN_MAX.min(limit / 4));
        }
    }

    #[test]
    fn random_reads_and_small_reads_of_one_block_read_nothing_ahead() {
        let mut sequences = Sequences::default();
        for block in [5, 900, 17, 300, 44, 5, 5, 5] {
            assert!(sequences.read(block..block + 1, 1000, AHEAD_MAX).is_empty());
        }
    }

    #[test]
    fn reads_of_several_tasks_in_any_order_are_one_sequence() {
        let mut sequences = Sequences::default();
        let mut end = 0;
        for first in (0..960_u64).step_by(4) {
            for block in [first, first + 1, first + 3, first + 2] {
                let ahead = sequences.read(block..block + 1, 1000, AHEAD_MAX);
                assert!(ahead.is_empty() || ahead.start >= end, "twice: {ahead:?}");
                end = end.max(ahead.end);
            }
            assert!(sequences.0.len() <= 2, "{sequences:?}");
        }
        assert_eq!(end, 1000);
    }

    #[test]
    fn several_readers_have_windows_of_their_own_and_none_goes_past_the_end() {
        let mut sequences = Sequences::default();
        for step in 0..100 {
            for start in [0, 1000, 2000] {
                let block = start + step;
                let ahead = sequences.read(block..block + 1, 2050, AHEAD_MAX);
                assert!(ahead.end <= 2050.max(block + 1));
            }
        }
        assert_eq!(sequences.0.len(), 3);
        assert!(sequences.0.iter().take(2).all(|sequence| sequence.window == AHEAD_MAX));
    }
}
