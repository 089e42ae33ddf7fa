//! How the bytes of a read or a write lie in memory.

use std::os::fd::BorrowedFd;

use super::spare::Spare;
use crate::export::PlacedWrite;
use crate::reply_bytes::ReplyBytes;
use crate::sys::uring::Part;

/// How the bytes of a read lie in its buffer: they begin at byte `at`, where at least the head has
/// room in front of them, and the tail behind them.
pub(super) struct Layout {
    at: usize,
    length: usize,
    /// How much the system has to read for them.
    needed: usize,
    head: Vec<u8>,
    tail: Vec<u8>,
}

impl Layout {
    /// Memory for a read: where the system is to read to, and how much. Whole blocks of the file
    /// are read if the alignment says so; `skipped` bytes are before the first one wanted. `None`
    /// for more than can be.
    pub(super) fn new(
        skipped: usize,
        length: usize,
        (head, tail): (Vec<u8>, Vec<u8>),
        (block, memory_alignment): (usize, usize),
        spare: &mut Spare,
    ) -> Option<(Part, Self)> {
        let needed = skipped + length;
        let blocks = needed.checked_next_multiple_of(block)?;
        // Never resized before the end of the read, so it stays where it is.
        let buffer = spare.take(head.len() + blocks + memory_alignment + tail.len());
        let first = buffer.as_ptr().addr() + head.len();
        let at = head.len() + first.wrapping_neg() % memory_alignment;
        let layout = Self { at: at + skipped, length, needed, head, tail };
        Some(((buffer, at, blocks), layout))
    }

    /// Joins all bytes; `None` if some are missing.
    pub(super) fn finish(self, mut buffer: Vec<u8>, read: usize) -> Option<ReplyBytes> {
        let Self { at, length, needed, head, tail } = self;
        if read < needed {
            return None;
        }
        let start = at.checked_sub(head.len())?;
        buffer.get_mut(start..at)?.copy_from_slice(&head);
        let data_end = at + length;
        let end = data_end + tail.len();
        buffer.get_mut(data_end..end)?.copy_from_slice(&tail);
        Some(ReplyBytes::new(buffer, start..end))
    }
}

/// The payload of a write in memory that is aligned as the file wants it, and where it begins
/// there.
pub(super) fn aligned(payload: Vec<u8>, alignment: usize, spare: &mut Spare) -> (Vec<u8>, usize) {
    if payload.as_ptr().addr().is_multiple_of(alignment) {
        return (payload, 0);
    }
    // Never resized, so it stays where it is.
    let mut buffer = spare.take(payload.len() + alignment);
    let at = buffer.as_ptr().addr().wrapping_neg() % alignment;
    buffer[at..at + payload.len()].copy_from_slice(&payload);
    (buffer, at)
}

/// Where a write of `length` bytes goes, and the alignment of its memory, if it can be written as
/// it is.
pub(super) fn target(
    placed: &dyn PlacedWrite,
    length: usize,
) -> Option<(BorrowedFd<'_>, u64, usize)> {
    let (file, offset) = (placed.file()?, placed.offset());
    let ends = [offset, length as u64];
    let is_aligned = ends.iter().all(|end| end.is_multiple_of(file.offset_alignment));
    is_aligned.then_some((file.fd, offset, file.memory_alignment))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_what_was_read_between_its_head_and_its_tail_at_any_alignment() {
        let mut spare = Spare::default();
        for (block, memory) in [(1, 1), (512, 4), (512, 512), (4096, 4096)] {
            for skipped in [0, 1, 511, 4095].map(|skipped| skipped % block) {
                for (length, around) in [(1, 0), (512, 16), (4096, 32), (5000, 4100)] {
                    let (head, tail) = (vec![1; around], vec![3; around / 2]);
                    let planned =
                        Layout::new(skipped, length, (head, tail), (block, memory), &mut spare);
                    let ((mut buffer, at, blocks), layout) = planned.unwrap();
                    assert!(buffer[at..].as_ptr().addr().is_multiple_of(memory));
                    assert!(blocks.is_multiple_of(block) && blocks >= skipped + length);
                    buffer[at..at + blocks].fill(9);
                    buffer[at + skipped..][..length].fill(2);
                    let reply = layout.finish(buffer, blocks).unwrap();
                    let expected = [vec![1; around], vec![2; length], vec![3; around / 2]].concat();
                    assert_eq!(*reply, *expected, "{block} {memory} {skipped} {length} {around}");
                    spare.give_back(reply.into_parts().0);
                }
            }
        }
    }

    #[test]
    fn a_reply_without_all_of_its_bytes_is_none() {
        let mut spare = Spare::default();
        for (read, is_whole) in [(0, false), (1535, false), (1536, true), (2048, true)] {
            let planned = Layout::new(512, 1024, (vec![1], vec![3]), (2048, 512), &mut spare);
            let ((buffer, ..), layout) = planned.unwrap();
            assert_eq!(layout.finish(buffer, read).is_some(), is_whole, "{read}");
        }
        let none = (Vec::new(), Vec::new());
        assert!(Layout::new(0, usize::MAX, none, (512, 512), &mut spare).is_none());
    }
}
