//! The queue of replies, which sends many with one system call.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::AsFd;
use std::task::{Context, Poll};

use super::error::ConnectionError;
use super::plain::More;
use super::socket::Socket;
use super::turn::Turn;
use crate::budget::Permit;
use crate::export::FileSpan;
use crate::reply_bytes::ReplyBytes;

/// Size of a block that collects replies, in bytes: the most common large read, with its header.
const BLOCK_LEN: usize = 256 * 1024 + 4096;
/// Size of a block behind a piece that is not copied, in bytes, which often has only the header of
/// the next one: a whole block for each of them would be many times the memory of a connection.
const SHORT_BLOCK_LEN: usize = 2048;
/// Replies shorter than this, in bytes, are copied into a block rather than sent as a separate
/// piece.
const COPIED_LEN: usize = 16 * 1024;
/// Pieces handed to the system at a time.
const MAX_SLICES: usize = 16;
/// Blocks kept for the next replies.
const MAX_SPARE_BLOCKS: usize = 4;

enum Segment {
    /// A block with space at its end for further replies.
    Block(Block),
    /// One complete reply.
    Owned { data: Vec<u8>, start: usize, _permit: Option<Permit> },
    /// Bytes to be sent from the page cache.
    File { span: FileSpan, length: usize },
}

struct Block {
    data: Box<[u8]>,
    start: usize,
    end: usize,
}

/// Replies in the order in which they will be sent.
#[derive(Default)]
pub(super) struct SendQueue {
    segments: VecDeque<Segment>,
    queued: usize,
    total_sent: u64,
    spare: Vec<Box<[u8]>>,
}

impl SendQueue {
    /// Bytes that have not been sent yet.
    pub(super) const fn queued(&self) -> usize {
        self.queued
    }

    /// The total of sent bytes, modulo 2^64.
    pub(super) const fn total_sent(&self) -> u64 {
        self.total_sent
    }

    pub(super) fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Contiguous space for one reply of up to `length` bytes; nothing is queued until
    /// [`SendQueue::commit`].
    pub(super) fn space(&mut self, length: usize) -> &mut [u8] {
        let (fits, least) = match self.segments.back() {
            Some(Segment::Block(block)) => (block.data.len() - block.end >= length, BLOCK_LEN),
            Some(_) => (false, SHORT_BLOCK_LEN),
            None => (false, BLOCK_LEN),
        };
        if !fits {
            let data = match self.spare.pop() {
                Some(data) if data.len() >= length => data,
                _ => vec![0; length.max(least)].into_boxed_slice(),
            };
            self.segments.push_back(Segment::Block(Block { data, start: 0, end: 0 }));
        }
        match self.segments.back_mut() {
            Some(Segment::Block(block)) => &mut block.data[block.end..][..length],
            // The block was pushed above.
            _ => &mut [],
        }
    }

    /// Queues the first `length` bytes of the last [`SendQueue::space`]; nothing if it is 0.
    pub(super) fn commit(&mut self, length: usize) {
        let Some(Segment::Block(block)) = self.segments.back_mut() else { return };
        block.end += length;
        self.queued += length;
        if block.start == block.end
            && let Some(Segment::Block(block)) = self.segments.pop_back()
        {
            self.keep(block.data);
        }
    }

    /// Queues a reply that is written by `encode` and has at most `length` bytes.
    pub(super) fn encode(&mut self, length: usize, encode: impl FnOnce(&mut &mut [u8])) {
        let mut rest = self.space(length);
        encode(&mut rest);
        let written = length - rest.len();
        self.commit(written);
    }

    /// Queues a complete reply. Its permit is held until the last byte is sent. A short one is
    /// copied: the number of bytes comes back, and the memory, which is free again. Those of a long
    /// one count when they are sent.
    pub(super) fn push(&mut self, bytes: ReplyBytes, permit: Option<Permit>) -> (usize, Vec<u8>) {
        let length = bytes.len();
        if length < COPIED_LEN {
            self.space(length).copy_from_slice(&bytes);
            self.commit(length);
            return (length, bytes.into_parts().0);
        }
        self.queued += length;
        let (mut data, range) = bytes.into_parts();
        data.truncate(range.end);
        let start = range.start;
        self.segments.push_back(Segment::Owned { data, start, _permit: permit });
        (0, Vec::new())
    }

    /// Queues `length` bytes of a file.
    pub(super) fn push_file(&mut self, span: FileSpan, length: usize) {
        self.queued += length;
        self.segments.push_back(Segment::File { span, length });
    }

    /// Sends until the queue is empty, the socket takes no more, or the turn is over. Long replies
    /// are charged to the turn as they are sent; those in blocks were charged when they were made.
    pub(super) fn poll_flush(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut Socket,
        turn: &mut Turn,
    ) -> Poll<Result<(), ConnectionError>> {
        while let Some(front) = self.segments.front() {
            // Read only once: another connection may come to the thread at any time, and 0 sent
            // bytes of a file mean its end.
            let left = turn.left();
            let sent = match front {
                Segment::File { .. } | Segment::Owned { .. } if left == 0 => {
                    return Poll::Pending;
                }
                Segment::File { span, length } => {
                    let length = left.min(*length);
                    match socket.poll_send_file(cx, span.file.as_fd(), span.offset, length) {
                        Poll::Ready(Ok(0)) => {
                            return Poll::Ready(Err(ConnectionError::FileTruncated));
                        }
                        result => result,
                    }
                }
                _ => self.poll_send_bytes(cx, socket, left),
            };
            match sent {
                Poll::Ready(Ok(count)) => turn.spend(self.sent(count)),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
                Poll::Pending => return Poll::Pending,
            }
        }
        socket.poll_flush(cx).map_err(Into::into)
    }

    /// Sends bytes from memory, at most `allowed` of them from long replies.
    fn poll_send_bytes(
        &self,
        cx: &mut Context<'_>,
        socket: &mut Socket,
        mut allowed: usize,
    ) -> Poll<std::io::Result<usize>> {
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let mut count = 0;
        let mut more = More::No;
        for segment in &self.segments {
            let bytes = match segment {
                Segment::Block(block) => &block.data[block.start..block.end],
                Segment::Owned { data, start, .. } if allowed > 0 => {
                    let rest = &data[*start..];
                    let part = &rest[..allowed.min(rest.len())];
                    allowed -= part.len();
                    part
                }
                Segment::Owned { .. } | Segment::File { .. } => {
                    more = More::Follows;
                    break;
                }
            };
            let Some(slot) = slices.get_mut(count) else {
                more = More::Follows;
                break;
            };
            *slot = IoSlice::new(bytes);
            count += 1;
            if let Segment::Owned { data, start, .. } = segment
                && bytes.len() < data.len() - start
            {
                more = More::Follows;
                break;
            }
        }
        socket.poll_send(cx, &slices[..count], more)
    }

    /// Removes `count` sent bytes from the front. Returns the number of them that belong to long
    /// replies.
    fn sent(&mut self, mut count: usize) -> usize {
        self.queued -= count;
        self.total_sent = self.total_sent.wrapping_add(count as u64);
        let mut long = 0;
        while let Some(front) = self.segments.front_mut() {
            let left = match front {
                Segment::Block(block) => block.end - block.start,
                Segment::Owned { data, start, .. } => data.len() - *start,
                Segment::File { length, .. } => *length,
            };
            if !matches!(front, Segment::Block(_)) {
                long += count.min(left);
            }
            if count < left {
                match front {
                    Segment::Block(block) => block.start += count,
                    Segment::Owned { start, .. } => *start += count,
                    Segment::File { span, length } => {
                        span.offset += count as u64;
                        *length -= count;
                    }
                }
                return long;
            }
            count -= left;
            if let Some(Segment::Block(block)) = self.segments.pop_front() {
                self.keep(block.data);
            }
        }
        long
    }

    /// Frees the memory that is kept for the next replies.
    pub(super) fn shrink(&mut self) {
        self.spare.clear();
    }

    fn keep(&mut self, data: Box<[u8]>) {
        // Blocks made for one long reply are freed.
        if data.len() == BLOCK_LEN && self.spare.len() < MAX_SPARE_BLOCKS {
            self.spare.push(data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_from_a_file_take_little_memory() {
        let file = std::sync::Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        let mut queue = SendQueue::default();
        for _ in 0..32 {
            queue.encode(32, |out| *out = &mut std::mem::take(out)[20..]);
            queue.push_file(FileSpan { file: std::sync::Arc::clone(&file), offset: 0 }, 32 * 1024);
        }
        let blocks = queue.segments.iter().filter_map(|segment| match segment {
            Segment::Block(block) => Some(block.data.len()),
            _ => None,
        });
        assert_eq!(queue.queued(), 32 * (20 + 32 * 1024));
        assert!(blocks.sum::<usize>() < 2 * BLOCK_LEN);
    }

    #[test]
    fn short_replies_share_a_block() {
        let mut queue = SendQueue::default();
        for _ in 0..64 {
            queue.space(4096);
            queue.commit(4096);
        }
        assert_eq!(queue.segments.len(), 1);
    }
}
