//! The ledger of written blocks: the generations that each block may hold.
//!
//! Each block has three counts. A server that is asked for a block may answer with
//!
//! - any generation from the newest *acknowledged* one when the READ was sent to the newest
//!   *issued* one when it was answered;
//! - after a lost connection, when the server may have been restarted, also with older ones down to
//!   the newest *durable* one: acknowledged with FUA, or before a FLUSH that succeeded.
//!
//! Only one WRITE of a block is in flight at a time.

use super::block::{Identity, fill, inspect};
use super::targets::Section;
use super::verdict::{Mismatch, judge};

/// Most blocks of a ledger: 2 GiB of memory, half of it for the state at the start of a run.
pub(super) const MAX_BLOCKS: u64 = 1 << 26;

/// The counts of one block; 0 is its earlier contents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Generations {
    pub(super) durable: u32,
    pub(super) acknowledged: u32,
    pub(super) issued: u32,
    is_busy: bool,
}

impl Generations {
    /// As an earlier run left it.
    pub(super) fn known(oldest: u32, newest: u32) -> Self {
        Self { durable: oldest, acknowledged: oldest, issued: newest, is_busy: false }
    }
}

/// The oldest generations that may be found, when a READ is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Expected {
    durable: u32,
    acknowledged: u32,
}

/// Writes that a flush will make durable: blocks and their generations.
pub(super) type Covered = Vec<(u32, u32)>;

/// The blocks of a section.
#[derive(Debug)]
pub(super) struct Ledger {
    section: Section,
    block_len: u32,
    seed: u64,
    blocks: Vec<Generations>,
    unflushed: Covered,
    /// Number of lost connections.
    epoch: u64,
}

impl Ledger {
    /// `blocks` has one entry for each block of `section`.
    pub(super) fn new(
        section: Section,
        block_len: u32,
        seed: u64,
        blocks: Vec<Generations>,
    ) -> Self {
        Self { section, block_len, seed, blocks, unflushed: Vec::new(), epoch: 0 }
    }

    /// The part of the disk.
    pub(super) fn section(&self) -> Section {
        self.section
    }

    /// Returns the blocks for the record. Later, writes that are not durable may be missing; of a
    /// server without FLUSH all acknowledged writes are expected.
    pub(super) fn into_blocks(mut self, can_flush: bool) -> Vec<Generations> {
        if !can_flush {
            for block in &mut self.blocks {
                block.durable = block.acknowledged;
            }
        }
        self.blocks
    }

    /// The present epoch; requests remember it.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The ranges that were written, in pieces of at most `longest` bytes.
    pub(super) fn written(&self, longest: u32) -> Vec<(u64, u32)> {
        let most = (longest / self.block_len.max(1)).max(1) as usize;
        let mut ranges: Vec<(u64, u32)> = Vec::new();
        let mut offset = self.section.offset;
        for chunk in self.blocks.chunk_by(|a, b| (a.issued > 0) == (b.issued > 0)) {
            for piece in chunk.chunks(most) {
                let length = piece.len() as u32 * self.block_len;
                if piece.first().is_some_and(|block| block.issued > 0) {
                    ranges.push((offset, length));
                }
                offset += u64::from(length);
            }
        }
        ranges
    }

    /// Begins a WRITE; false if one of its blocks is being written.
    pub(super) fn begin_write(&mut self, offset: u64, length: u32) -> bool {
        let blocks = self.blocks_mut(offset, length);
        if blocks.iter().any(|block| block.is_busy || block.issued == u32::MAX) {
            return false;
        }
        for block in blocks {
            block.issued += 1;
            block.is_busy = true;
        }
        true
    }

    /// The data of a WRITE that was begun.
    pub(super) fn fill(&self, offset: u64, data: &mut [u8]) {
        let seed = self.seed;
        let blocks = self.blocks_of(offset, data.len());
        for ((block, data), at) in
            blocks.iter().zip(data.chunks_mut(self.block_len as usize)).zip(0_u64..)
        {
            let offset = offset + at * u64::from(self.block_len);
            fill(data, Identity { seed, offset, generation: u64::from(block.issued) });
        }
    }

    /// A WRITE was acknowledged that was sent in `epoch`.
    pub(super) fn end_write(&mut self, offset: u64, length: u32, is_durable: bool, epoch: u64) {
        let is_current = epoch == self.epoch;
        let first = self.index(offset);
        let mut covered = std::mem::take(&mut self.unflushed);
        for (block, index) in self.blocks_mut(offset, length).iter_mut().zip(first..) {
            block.is_busy = false;
            if is_durable {
                block.durable = block.issued;
                block.acknowledged = block.issued;
            } else if is_current {
                block.acknowledged = block.issued;
                covered.push((index as u32, block.issued));
            }
        }
        self.unflushed = covered;
    }

    /// A FLUSH is sent: what it covers.
    pub(super) fn begin_flush(&mut self) -> Covered {
        std::mem::take(&mut self.unflushed)
    }

    /// A FLUSH succeeded that was sent in `epoch`.
    pub(super) fn end_flush(&mut self, covered: Covered, epoch: u64) {
        if epoch != self.epoch {
            return;
        }
        for (index, generation) in covered {
            if let Some(block) = self.blocks.get_mut(index as usize) {
                block.durable = block.durable.max(generation);
            }
        }
    }

    /// The connection was lost: the server may have lost what was not flushed.
    pub(super) fn lose(&mut self) {
        self.epoch += 1;
        self.unflushed.clear();
        for block in &mut self.blocks {
            block.acknowledged = block.durable;
        }
    }

    /// Adds the oldest generations that a READ sent now may find.
    pub(super) fn expect(&self, offset: u64, length: u32, expected: &mut Vec<Expected>) {
        expected.clear();
        expected.extend(
            self.blocks_of(offset, length as usize)
                .iter()
                .map(|block| Expected { durable: block.durable, acknowledged: block.acknowledged }),
        );
    }

    /// Looks at the data of a READ that was sent in `epoch`; hands out every block that is not as
    /// it must be, and gives the number of those that are.
    pub(super) fn check(
        &self,
        offset: u64,
        data: &[u8],
        expected: &[Expected],
        epoch: u64,
        mut wrong: impl FnMut(Mismatch),
    ) -> u64 {
        let mut good = 0;
        let blocks = self.blocks_of(offset, data.len());
        let all = blocks.iter().zip(expected).zip(data.chunks(self.block_len as usize));
        for (((block, expected), data), at) in all.zip(0_u64..) {
            if block.issued == 0 {
                continue;
            }
            let oldest = if epoch == self.epoch { expected.acknowledged } else { expected.durable };
            let offset = offset + at * u64::from(self.block_len);
            match judge(inspect(data), self.seed, offset, oldest, block.issued) {
                None => good += 1,
                Some(what) => wrong(Mismatch { offset, what }),
            }
        }
        good
    }

    fn index(&self, offset: u64) -> usize {
        let distance =
            offset.saturating_sub(self.section.offset) / u64::from(self.block_len.max(1));
        usize::try_from(distance).unwrap_or(usize::MAX)
    }

    fn blocks_of(&self, offset: u64, length: usize) -> &[Generations] {
        let first = self.index(offset);
        let count = length / self.block_len.max(1) as usize;
        self.blocks.get(first..first.saturating_add(count)).unwrap_or_default()
    }

    fn blocks_mut(&mut self, offset: u64, length: u32) -> &mut [Generations] {
        let first = self.index(offset);
        let count = (length / self.block_len.max(1)) as usize;
        self.blocks.get_mut(first..first.saturating_add(count)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u32 = 512;

    fn ledger() -> Ledger {
        let section = Section { offset: 4096, length: 8 * u64::from(LEN) };
        Ledger::new(section, LEN, 9, vec![Generations::default(); 8])
    }

    fn block(offset: u64, generation: u64) -> Vec<u8> {
        let mut data = vec![0; LEN as usize];
        fill(&mut data, Identity { seed: 9, offset, generation });
        data
    }

    /// Writes one block and has it acknowledged.
    fn write(ledger: &mut Ledger, offset: u64) {
        assert!(ledger.begin_write(offset, LEN));
        ledger.end_write(offset, LEN, false, ledger.epoch());
    }

    /// Whether a READ that is sent and answered now may have this content.
    fn may_be(ledger: &Ledger, offset: u64, data: &[u8]) -> bool {
        let (mut expected, mut wrong) = (Vec::new(), 0);
        ledger.expect(offset, LEN, &mut expected);
        ledger.check(offset, data, &expected, ledger.epoch(), |_| wrong += 1);
        wrong == 0
    }

    #[test]
    fn acknowledged_write_is_seen_and_an_older_one_is_not_accepted() {
        let mut ledger = ledger();
        assert!(may_be(&ledger, 4096, &[3; 512]), "nothing was written yet");
        write(&mut ledger, 4096);
        write(&mut ledger, 4096);
        assert!(may_be(&ledger, 4096, &block(4096, 2)));
        for wrong in [block(4096, 1), block(4096, 3), block(4608, 2), vec![0; 512], vec![3; 512]] {
            assert!(!may_be(&ledger, 4096, &wrong));
        }
    }

    #[test]
    fn write_in_flight_may_be_seen_or_not() {
        let mut ledger = ledger();
        write(&mut ledger, 4608);
        assert!(ledger.begin_write(4608, LEN));
        assert!(!ledger.begin_write(4096, 2 * LEN), "one of its blocks is being written");
        assert!(may_be(&ledger, 4608, &block(4608, 1)) && may_be(&ledger, 4608, &block(4608, 2)));
        let mut torn = block(4608, 2);
        torn[256..].copy_from_slice(&block(4608, 1)[256..]);
        assert!(!may_be(&ledger, 4608, &torn));
    }

    #[test]
    fn write_that_is_acknowledged_during_a_read_need_not_be_seen() {
        let mut ledger = ledger();
        write(&mut ledger, 4096);
        let mut expected = Vec::new();
        ledger.expect(4096, LEN, &mut expected);
        write(&mut ledger, 4096);
        let found = ledger.check(4096, &block(4096, 1), &expected, 0, |it| panic!("{it:?}"));
        assert_eq!(found, 1);
    }

    #[test]
    fn restart_may_lose_what_was_not_flushed_and_nothing_else() {
        let mut ledger = ledger();
        write(&mut ledger, 4096);
        let covered = ledger.begin_flush();
        write(&mut ledger, 4096);
        ledger.end_flush(covered, 0);
        write(&mut ledger, 4608);
        ledger.lose();
        assert!(may_be(&ledger, 4096, &block(4096, 1)), "the second was not flushed");
        assert!(may_be(&ledger, 4096, &block(4096, 2)));
        assert!(!may_be(&ledger, 4096, &[0; 512]), "the first was flushed");
        assert!(may_be(&ledger, 4608, &[0; 512]), "it was never flushed");
    }

    #[test]
    fn acknowledgement_or_flush_from_before_a_loss_proves_nothing() {
        let mut ledger = ledger();
        write(&mut ledger, 4096);
        let covered = ledger.begin_flush();
        assert!(ledger.begin_write(4608, LEN));
        ledger.lose();
        ledger.end_flush(covered, 0);
        ledger.end_write(4608, LEN, false, 0);
        assert!(may_be(&ledger, 4096, &[0; 512]) && may_be(&ledger, 4608, &[0; 512]));
        assert!(ledger.begin_write(4608, LEN), "it is not in flight any more");
        ledger.end_write(4608, LEN, true, 1);
        assert!(!may_be(&ledger, 4608, &[0; 512]), "FUA");
    }

    #[test]
    fn written_ranges_are_merged_up_to_a_length() {
        let mut ledger = ledger();
        for index in [0, 1, 2, 5] {
            write(&mut ledger, 4096 + index * 512);
        }
        assert_eq!(ledger.written(1024), [(4096, 1024), (5120, 512), (6656, 512)]);
    }

    #[test]
    fn data_of_several_blocks_is_made_and_checked() {
        let mut ledger = ledger();
        write(&mut ledger, 4608);
        assert!(ledger.begin_write(4096, 3 * LEN));
        let mut data = vec![0; 3 * LEN as usize];
        ledger.fill(4096, &mut data);
        assert_eq!(data, [block(4096, 1), block(4608, 2), block(5120, 1)].concat());
        ledger.end_write(4096, 3 * LEN, false, 0);
        let mut expected = Vec::new();
        ledger.expect(4096, 3 * LEN, &mut expected);
        assert_eq!(ledger.check(4096, &data, &expected, 0, |it| panic!("{it:?}")), 3);
    }
}
