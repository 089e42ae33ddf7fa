//! A request in flight and its partial answer.
//!
//! Answers are collected in buffers that belong to the request, not to the caller: a caller may
//! drop its future at any moment, and the connection keeps its position in the stream.

use std::io;
use std::pin::pin;
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes, BytesMut};
use nbd_proto::transmission::Command;
use nbd_proto::transmission::client::ServerError;
use nbd_proto::wire::BlockDescriptor;
use tokio::io::AsyncReadExt;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::error::{Error, Result};
use crate::memory::ReadMemory;
use crate::stream::Stream;

/// A part of the range that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadChunk {
    /// Data.
    Data {
        /// Offset in the export, in bytes.
        offset: u64,
        /// The data.
        data: Bytes,
    },
    /// A range that reads as zeroes, as reported by the server.
    Hole {
        /// Offset in the export, in bytes.
        offset: u64,
        /// Length, in bytes.
        length: u64,
    },
}

impl ReadChunk {
    /// Returns the offset in the export, in bytes.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        match self {
            Self::Data { offset, .. } | Self::Hole { offset, .. } => *offset,
        }
    }

    /// Returns the length, in bytes.
    #[must_use]
    pub const fn length(&self) -> u64 {
        match self {
            Self::Data { data, .. } => data.len() as u64,
            Self::Hole { length, .. } => *length,
        }
    }
}

/// The result of a request.
#[derive(Debug)]
pub(crate) enum Outcome {
    Done,
    Data(Bytes),
    Chunks(Vec<ReadChunk>),
    /// The descriptors of each context, in the order of the client's list.
    Status(Vec<(usize, Vec<BlockDescriptor>)>),
}

/// A queued or sent request.
#[derive(Debug)]
pub(crate) struct Submission {
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) command: Command,
    /// For the block status of a single context: its index in the client's list.
    pub(crate) context: Option<usize>,
    /// The data of a WRITE.
    pub(crate) payload: Bytes,
    pub(crate) collect: Collect,
    /// The time at which the request was first sent, if there is a time limit.
    pub(crate) sent: Option<Instant>,
    /// The time at which a server first refused it because of its shutdown.
    pub(crate) refused_since: Option<Instant>,
    pub(crate) reply: oneshot::Sender<Result<Outcome>>,
}

impl Submission {
    /// The number of data bytes that this request transfers.
    pub(crate) fn data_len(&self) -> usize {
        match self.command {
            Command::Read(_) => usize::try_from(self.length).unwrap_or(usize::MAX),
            _ => self.payload.len(),
        }
    }

    /// Returns true if the caller has dropped its future.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.reply.is_closed()
    }

    /// Delivers the answer to the caller, if it still waits.
    pub(crate) fn complete(self, result: Result<(), ServerError>) {
        let result = match result {
            Ok(()) => Ok(self.collect.finish(self.offset, self.length)),
            Err(source) => Err(Error::Request {
                command: self.command.command_type(),
                offset: self.offset,
                length: self.length,
                source,
            }),
        };
        drop(self.reply.send(result));
    }

    pub(crate) fn fail(self, error: Error) {
        drop(self.reply.send(Err(error)));
    }
}

/// The part of the answer received so far. The protocol machine has checked every position against
/// the request.
#[derive(Debug)]
pub(crate) enum Collect {
    /// Success or failure only.
    Nothing,
    /// One buffer, with zeroes where the server reported holes.
    Flat(BytesMut),
    /// Data and holes separately, in the order of arrival, by their distance from the request's
    /// offset; and memory for the data.
    Chunks(Vec<(u64, PartialChunk)>, ReadMemory),
    /// Descriptors by context.
    Status(Vec<(usize, Vec<BlockDescriptor>)>),
}

/// A chunk that is being received.
#[derive(Debug)]
pub(crate) enum PartialChunk {
    Data(BytesMut),
    Hole(u64),
}

impl Collect {
    /// Drops everything received, for a request that is sent again.
    pub(crate) fn reset(&mut self) {
        match self {
            Self::Nothing => {}
            Self::Flat(buffer) => buffer.clear(),
            Self::Chunks(chunks, _) => chunks.clear(),
            Self::Status(contexts) => contexts.clear(),
        }
    }

    /// Reserves `length` bytes at `position` of a READ of `total` bytes.
    pub(crate) fn begin_data(&mut self, total: usize, position: u64, length: usize) {
        match self {
            Self::Flat(buffer) => {
                // Allocated once, and only when an answer arrives.
                buffer.reserve(total.saturating_sub(buffer.len()));
                let position = position as usize;
                if position > buffer.len() {
                    buffer.resize(position, 0);
                }
            }
            Self::Chunks(chunks, memory) => {
                let mut buffer = memory.take();
                buffer.reserve(length);
                chunks.push((position, PartialChunk::Data(buffer)));
            }
            Self::Nothing | Self::Status(_) => {}
        }
    }

    pub(crate) fn hole(&mut self, position: u64, length: usize) {
        match self {
            Self::Flat(buffer) => {
                // Bytes inside the buffer were zeroed when they were skipped.
                let end = (position as usize).saturating_add(length);
                if end > buffer.len() {
                    buffer.resize(end, 0);
                }
            }
            Self::Chunks(chunks, _) => chunks.push((position, PartialChunk::Hole(length as u64))),
            Self::Nothing | Self::Status(_) => {}
        }
    }

    pub(crate) fn status(&mut self, context: usize, descriptors: Vec<BlockDescriptor>) {
        if let Self::Status(contexts) = self {
            contexts.push((context, descriptors));
        }
    }

    /// Stores data received for `position`.
    pub(crate) fn push(&mut self, position: u64, data: &[u8]) {
        match self.place(position, data.len()) {
            Destination::Append(buffer) => buffer.extend_from_slice(data),
            Destination::Overwrite(slice) => slice.copy_from_slice(data),
            Destination::Nowhere => {}
        }
    }

    /// Reads up to `length` bytes for `position` directly from the socket.
    pub(crate) fn poll_fill(
        &mut self,
        position: u64,
        length: usize,
        stream: &mut Stream,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        match self.place(position, length) {
            Destination::Append(buffer) => {
                let mut buffer = buffer.limit(length);
                pin!(stream.read_buf(&mut buffer)).poll(cx)
            }
            Destination::Overwrite(slice) => pin!(stream.read(slice)).poll(cx),
            // Only READs receive data, and those have a destination.
            Destination::Nowhere => {
                Poll::Ready(Err(io::Error::other("data for a request without any")))
            }
        }
    }

    fn place(&mut self, position: u64, length: usize) -> Destination<'_> {
        let buffer = match self {
            Self::Flat(buffer) => buffer,
            // Chunks arrive completely, one after the other: only the last one grows.
            Self::Chunks(chunks, _) => match chunks.last_mut() {
                Some((_, PartialChunk::Data(buffer))) => return Destination::Append(buffer),
                _ => return Destination::Nowhere,
            },
            Self::Nothing | Self::Status(_) => return Destination::Nowhere,
        };
        let start = position as usize;
        if start >= buffer.len() {
            return Destination::Append(buffer);
        }
        let end = start.saturating_add(length);
        if end > buffer.len() {
            buffer.resize(end, 0);
        }
        buffer.get_mut(start..end).map_or(Destination::Nowhere, Destination::Overwrite)
    }

    fn finish(self, offset: u64, length: u64) -> Outcome {
        match self {
            Self::Nothing => Outcome::Done,
            Self::Flat(buffer) => {
                debug_assert_eq!(buffer.len() as u64, length, "the machine checked the coverage");
                Outcome::Data(buffer.freeze())
            }
            Self::Chunks(chunks, _) => Outcome::Chunks(in_order(offset, chunks)),
            Self::Status(mut contexts) => {
                contexts.sort_by_key(|(context, _)| *context);
                Outcome::Status(contexts)
            }
        }
    }
}

/// The destination of data.
enum Destination<'a> {
    Append(&'a mut BytesMut),
    Overwrite(&'a mut [u8]),
    Nowhere,
}

/// Sorts chunks by offset and joins neighbouring holes.
fn in_order(offset: u64, mut partial: Vec<(u64, PartialChunk)>) -> Vec<ReadChunk> {
    partial.sort_by_key(|(position, _)| *position);
    let mut chunks: Vec<ReadChunk> = Vec::with_capacity(partial.len());
    for (position, chunk) in partial {
        let offset = offset.saturating_add(position);
        match (chunk, chunks.last_mut()) {
            (PartialChunk::Hole(more), Some(ReadChunk::Hole { length, .. })) => {
                *length = length.saturating_add(more);
            }
            (PartialChunk::Hole(length), _) => chunks.push(ReadChunk::Hole { offset, length }),
            (PartialChunk::Data(data), _) => {
                chunks.push(ReadChunk::Data { offset, data: data.freeze() });
            }
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_in_any_order_land_in_their_places() {
        let mut collect = Collect::Flat(BytesMut::new());
        collect.begin_data(8, 6, 2);
        collect.push(6, b"gh");
        collect.hole(2, 2);
        collect.begin_data(8, 4, 2);
        collect.push(4, b"e");
        collect.push(5, b"f");
        collect.begin_data(8, 0, 2);
        collect.push(0, b"ab");
        let Outcome::Data(data) = collect.finish(100, 8) else { panic!("a flat answer") };
        assert_eq!(&data[..], b"ab\0\0efgh");
    }

    #[test]
    fn pieces_are_sorted_and_neighbouring_holes_joined() {
        let mut collect = Collect::Chunks(Vec::new(), ReadMemory::default());
        collect.hole(4, 2);
        collect.begin_data(8, 6, 2);
        collect.push(6, b"gh");
        collect.hole(0, 4);
        let Outcome::Chunks(chunks) = collect.finish(100, 8) else { panic!("chunks") };
        let data = Bytes::from_static(b"gh");
        assert_eq!(
            chunks,
            [ReadChunk::Hole { offset: 100, length: 6 }, ReadChunk::Data { offset: 106, data }]
        );
    }

    #[test]
    fn memory_that_was_given_back_holds_the_next_data() {
        let memory = ReadMemory::new(1);
        let spare = Bytes::from(vec![7; 64]);
        let place = spare.as_ptr();
        memory.give_back(spare);
        let mut collect = Collect::Chunks(Vec::new(), memory.clone());
        collect.hole(0, 4);
        collect.begin_data(8, 4, 2);
        collect.push(4, b"ef");
        collect.begin_data(8, 6, 2);
        collect.push(6, b"gh");
        let Outcome::Chunks(chunks) = collect.finish(0, 8) else { panic!("chunks") };
        let [
            ReadChunk::Hole { length: 4, .. },
            ReadChunk::Data { data: first, .. },
            ReadChunk::Data { .. },
        ] = chunks.as_slice()
        else {
            panic!("{chunks:?}")
        };
        assert_eq!((&first[..], first.as_ptr()), (&b"ef"[..], place));
    }

    #[test]
    fn a_request_that_is_sent_again_starts_from_nothing() {
        let mut collect = Collect::Flat(BytesMut::new());
        collect.begin_data(4, 0, 4);
        collect.push(0, b"abc");
        collect.reset();
        collect.begin_data(4, 0, 4);
        collect.push(0, b"wxyz");
        let Outcome::Data(data) = collect.finish(0, 4) else { panic!("a flat answer") };
        assert_eq!(&data[..], b"wxyz");
    }
}
