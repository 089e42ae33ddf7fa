//! Sequential readers, and how far to read ahead for each.

use std::ops::Range;

/// Most blocks that are read ahead: 16 MiB.
pub(super) const AHEAD_MAX: u64 = 64;

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

impl Sequences {
    /// Records a read of blocks, and returns the blocks behind them to be read ahead. `count` is
    /// the number of blocks of the object.
    pub(super) fn read(&mut self, read: Range<u64>, count: u64) -> Range<u64> {
        let continues = |sequence: &Sequence| {
            (sequence.next.saturating_sub(1)..=sequence.next).contains(&read.start)
        };
        let Some(index) = self.0.iter().rposition(continues) else {
            if self.0.len() == SEQUENCES_MAX {
                self.0.remove(0);
            }
            self.0.push(Sequence { next: read.end, window: 0, ahead: read.end });
            return read.end..read.end;
        };
        let mut sequence = self.0.remove(index);
        if read.end > sequence.next {
            sequence.window = (sequence.window * 2).clamp(1, AHEAD_MAX);
            sequence.next = read.end;
        }
        let begun = sequence.ahead.max(read.end);
        let wanted = read.end.saturating_add(sequence.window).min(count);
        // Half a window at a time makes ranges long.
        let is_due = begun < read.end.saturating_add(sequence.window.div_ceil(2)).min(count);
        let ahead = if is_due { begun..wanted } else { read.end..read.end };
        sequence.ahead = if is_due { wanted } else { begun };
        self.0.push(sequence);
        ahead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_doubles_up_to_its_limit_while_reads_are_sequential() {
        let mut sequences = Sequences::default();
        let mut longest = 0;
        let mut end = 0;
        for block in 0..500 {
            let ahead = sequences.read(block..block + 1, 1000);
            if !ahead.is_empty() {
                assert!(ahead.start > block && ahead.start >= end, "twice: {ahead:?}");
                assert!(ahead.end <= block + 1 + AHEAD_MAX);
                longest = longest.max(ahead.end - ahead.start);
                end = ahead.end;
            }
        }
        assert!((AHEAD_MAX / 2..=AHEAD_MAX).contains(&longest), "{longest}");
    }

    #[test]
    fn random_reads_and_small_reads_of_one_block_read_nothing_ahead() {
        let mut sequences = Sequences::default();
        for block in [5, 900, 17, 300, 44, 5, 5, 5] {
            assert!(sequences.read(block..block + 1, 1000).is_empty());
        }
    }

    #[test]
    fn several_readers_have_windows_of_their_own_and_none_goes_past_the_end() {
        let mut sequences = Sequences::default();
        for step in 0..100 {
            for start in [0, 1000, 2000] {
                let block = start + step;
                assert!(sequences.read(block..block + 1, 2050).end <= 2050.max(block + 1));
            }
        }
        assert_eq!(sequences.0.len(), 3);
        assert!(sequences.0.iter().take(2).all(|sequence| sequence.window == AHEAD_MAX));
    }
}
