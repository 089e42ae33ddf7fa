//! The possible contents of each block of a disk whose writes can be lost before a flush.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use anyhow::{Result, bail};

use super::random::Random;
use super::wire::{CMD_FLUSH, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, Wire};

/// The size of a block in bytes. Every block contains its number and the number of the write.
pub(super) const BLOCK: u64 = 512;

/// A write that a block may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Write {
    /// 0 stands for zeroes.
    version: u64,
    /// Whether the server acknowledged it. A refused write may have changed part of the block.
    is_done: bool,
}

/// A part of a disk that one client writes.
#[derive(Debug, Clone)]
pub(super) struct Blocks {
    first: u64,
    count: u64,
    next_version: u64,
    /// The possible contents of each block, oldest first. Blocks that are not listed are zero.
    possible: BTreeMap<u64, Vec<Write>>,
    /// Blocks that were not zero at some time.
    changed: BTreeSet<u64>,
    has_discards: bool,
}

/// The result of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The server acknowledged it.
    Done,
    /// The server refused it with this error.
    Refused(u32),
}

impl Blocks {
    /// `count` blocks from block `first` on, all zero.
    pub(super) fn new(first: u64, count: u64, has_discards: bool) -> Self {
        let (possible, changed) = (BTreeMap::new(), BTreeSet::new());
        Self { first, count, next_version: 1, possible, changed, has_discards }
    }

    /// As [`new`](Self::new), with discards, above a file of `below` blocks in which half of the
    /// parts have data. The data is written here.
    pub(super) fn above(first: u64, count: u64, file: &File, below: u64) -> std::io::Result<Self> {
        let mut blocks = Self::new(first, count, true);
        for block in (first..first + count).filter(|block| *block < below && block / 40 % 2 == 0) {
            file.write_all_at(&content(block, 1, blocks.next_version), block * BLOCK)?;
            let write = Write { version: blocks.next_version, is_done: true };
            blocks.possible.insert(block, vec![write]);
        }
        Ok(blocks)
    }

    /// Runs one random operation.
    ///
    /// # Errors
    ///
    /// The connection broke. The operation in flight may have been done.
    pub(super) fn step(&mut self, wire: &mut Wire, random: &mut Random) -> Result<Step> {
        let first = self.first + random.below(self.count);
        let most = (self.first + self.count - first).min(if random.one_in(8) { 600 } else { 24 });
        let count = random.below(most) + 1;
        let (offset, length) = (first * BLOCK, (count * BLOCK) as u32);
        let (version, command) = match random.below(12) {
            0 => return self.flush(wire),
            1 => (0, CMD_WRITE_ZEROES),
            2 if self.has_discards => (0, CMD_TRIM),
            _ => {
                self.next_version += 1;
                (self.next_version, CMD_WRITE)
            }
        };
        for block in first..first + count {
            let zeroes = Write { version: 0, is_done: true };
            let writes = self.possible.entry(block).or_insert_with(|| vec![zeroes]);
            writes.push(Write { version, is_done: false });
        }
        let error = match command {
            CMD_WRITE => wire.write(offset, &content(first, count, version))?,
            _ => wire.command(command, offset, length)?,
        };
        if error != 0 {
            return Ok(Step::Refused(error));
        }
        // A discard is advice: it may leave the contents unchanged.
        let is_done = command != CMD_TRIM;
        for block in first..first + count {
            let last = self.possible.get_mut(&block).and_then(|writes| writes.last_mut());
            last.into_iter().for_each(|write| write.is_done = is_done);
            if version != 0 {
                self.changed.insert(block);
            }
        }
        Ok(Step::Done)
    }

    /// FLUSH: everything acknowledged before survives from now on.
    ///
    /// # Errors
    ///
    /// The connection broke.
    pub(super) fn flush(&mut self, wire: &mut Wire) -> Result<Step> {
        let error = wire.command(CMD_FLUSH, 0, 0)?;
        if error != 0 {
            return Ok(Step::Refused(error));
        }
        self.keep_acknowledged();
        Ok(Step::Done)
    }

    /// Everything acknowledged before survives from now on.
    pub(super) fn keep_acknowledged(&mut self) {
        self.possible.values_mut().for_each(forget_what_was_overwritten);
    }

    /// Reads everything and treats the contents as durable.
    ///
    /// # Errors
    ///
    /// A block has impossible contents.
    pub(super) fn check(&mut self, wire: &mut Wire) -> Result<()> {
        let mut block = self.first;
        let end = self.first + self.count;
        while block < end {
            let count = (end - block).min(256);
            let bytes = wire.read(block * BLOCK, (count * BLOCK) as usize)?;
            for (index, content) in bytes.chunks_exact(BLOCK as usize).enumerate() {
                self.check_block(block + index as u64, content)?;
            }
            block += count;
        }
        Ok(())
    }

    fn check_block(&mut self, block: u64, found: &[u8]) -> Result<()> {
        let zeroes = [Write { version: 0, is_done: true }];
        let possible = self.possible.get(&block).map_or(&zeroes[..], Vec::as_slice);
        let held = possible.iter().rev().find(|write| content(block, 1, write.version) == found);
        let Some(held) = held else {
            bail!("block {block} holds {} where one of {possible:?} is right", describe(found));
        };
        let held = Write { is_done: true, ..*held };
        if held.version != 0 {
            self.changed.insert(block);
        }
        if let Some(writes) = self.possible.get_mut(&block) {
            *writes = vec![held];
        }
        Ok(())
    }

    /// Blocks that were not zero at some time.
    pub(super) fn changed(&self) -> impl Iterator<Item = u64> {
        self.changed.iter().copied()
    }
}

/// After a flush a block holds the last acknowledged write, or a refused one after it.
fn forget_what_was_overwritten(writes: &mut Vec<Write>) {
    let last = writes.iter().rposition(|write| write.is_done).unwrap_or(0);
    writes.drain(..last);
}

/// The bytes of blocks of one version.
fn content(first: u64, count: u64, version: u64) -> Vec<u8> {
    let mut bytes = vec![0; (count * BLOCK) as usize];
    if version != 0 {
        for (index, block) in bytes.chunks_exact_mut(BLOCK as usize).enumerate() {
            let number = first + index as u64;
            for (word, bytes) in block.chunks_exact_mut(16).enumerate() {
                bytes[..8].copy_from_slice(&(number << 8 | word as u64).to_be_bytes());
                bytes[8..].copy_from_slice(&version.to_be_bytes());
            }
        }
    }
    bytes
}

/// Decodes the version in a block.
fn describe(found: &[u8]) -> String {
    let word = |at: usize| found.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    let word = |at| word(at).map_or(0, u64::from_be_bytes);
    match (word(0), word(8)) {
        (0, 0) => "zeroes".to_owned(),
        (number, version) => format!("block {} of version {version}", number >> 8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks() -> Blocks {
        let mut blocks = Blocks::new(0, 4, true);
        let write = |version, is_done| Write { version, is_done };
        blocks.possible.insert(1, vec![write(3, true), write(5, true), write(7, false)]);
        blocks
    }

    #[test]
    fn unflushed_writes_may_be_lost_and_nothing_else_may_be_there() {
        for version in [3, 5, 7] {
            assert!(blocks().check_block(1, &content(1, 1, version)).is_ok(), "{version}");
        }
        for version in [0, 4, 6] {
            assert!(blocks().check_block(1, &content(1, 1, version)).is_err(), "{version}");
        }
        assert!(blocks().check_block(1, &content(2, 1, 5)).is_err(), "another block's content");
        assert!(blocks().check_block(2, &content(2, 1, 5)).is_err(), "never written");
    }

    #[test]
    fn flushed_writes_may_not_be_lost() {
        let mut flushed = blocks();
        flushed.possible.values_mut().for_each(forget_what_was_overwritten);
        assert!(flushed.clone().check_block(1, &content(1, 1, 3)).is_err());
        assert!(flushed.clone().check_block(1, &content(1, 1, 5)).is_ok());
        assert!(flushed.check_block(1, &content(1, 1, 7)).is_ok(), "refused, and done in part");
    }
}
