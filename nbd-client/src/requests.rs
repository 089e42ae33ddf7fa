//! The commands, one method each; ranges too long for one request are split here.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use nbd_proto::ApiMisuse;
use nbd_proto::limits::MAX_PAYLOAD;
use nbd_proto::transmission::{Command, Durability, ExtentLimit, Fragmentation, Speed, ZeroMode};
use nbd_proto::wire::{BlockDescriptor, MetaContextName, ReplyMode, TransmissionFlags};

use crate::client::{Client, NewRequest};
use crate::error::Result;
use crate::inflight::{Collect, Outcome, ReadChunk};
use crate::memory::ReadMemory;

/// Longest range of a request without data in compact mode, in bytes: the largest multiple of
/// every possible minimum block size below 2^32.
const LONGEST_COMPACT: u64 = 0xffff_0000;

/// # Requests
///
/// Ranges are in bytes. They have to be within the export, and both ends have to be multiples of
/// its [minimum block size](crate::ExportInfo::minimum_block_size); nothing is rounded. An empty
/// range is answered at once, without a request.
///
/// Every method fails with [`Error::Misuse`](crate::Error::Misuse) if the range is wrong or the
/// server does not offer the command, with [`Error::Request`](crate::Error::Request) if the server
/// refuses it, and with [`Error::Lost`](crate::Error::Lost) or
/// [`Error::Closed`](crate::Error::Closed) if the connection has ended.
impl Client {
    /// Reads a range. Ranges longer than the server's maximum are split; their parts are in flight
    /// together, and the answer is one block of memory.
    ///
    /// # Errors
    ///
    /// See the start of this section.
    ///
    /// # Cancel safety
    ///
    /// Safe: the answer is discarded when it arrives.
    pub async fn read(&self, range: Range<u64>) -> Result<Bytes> {
        let total = self.check_range(&range)?;
        let most = self.longest_payload();
        if total <= most {
            let offset = range.start;
            return if total == 0 { Ok(Bytes::new()) } else { self.read_once(offset, total).await };
        }
        let mut replies = Vec::new();
        for (offset, length) in split(range.start, total, most) {
            replies.push(self.submit(flat_read(offset, length)).await?);
        }
        let mut whole = BytesMut::with_capacity(total as usize);
        for reply in replies {
            whole.extend_from_slice(&data(reply.outcome().await?));
        }
        Ok(whole.freeze())
    }

    /// Like [`Client::read`], but reuses memory of the caller, such as that of an earlier answer
    /// ([`Bytes::try_into_mut`]): it is grown if it is too small, and its contents are discarded.
    /// Saves the page faults of fresh memory in bulk reads.
    ///
    /// # Errors
    ///
    /// See the start of this section.
    ///
    /// # Cancel safety
    ///
    /// Safe: the answer and the memory are discarded when it arrives.
    pub async fn read_reusing(&self, range: Range<u64>, mut buffer: BytesMut) -> Result<Bytes> {
        let total = self.check_range(&range)?;
        if total == 0 || total > self.longest_payload() {
            return self.read(range).await;
        }
        buffer.clear();
        let collect = Collect::Flat(buffer);
        let request = NewRequest { collect, ..flat_read(range.start, total) };
        Ok(data(self.submit(request).await?.outcome().await?))
    }

    /// Fills `buffer` with the bytes at `offset`. Needs one copy more than [`Client::read`].
    ///
    /// # Errors
    ///
    /// See the start of this section. After an error the contents of `buffer` are unspecified.
    ///
    /// # Cancel safety
    ///
    /// Safe: nothing touches `buffer` after the future is dropped.
    pub async fn read_into(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.check(offset, buffer.len() as u64)?;
        // The limit is at most 32 MiB.
        let most = self.longest_payload() as usize;
        let mut offset = offset;
        for part in buffer.chunks_mut(most) {
            let data = self.read_once(offset, part.len() as u64).await?;
            part.copy_from_slice(&data);
            offset = offset.saturating_add(part.len() as u64);
        }
        Ok(())
    }

    /// Reads a range as data and holes, in ascending order and without gaps. Servers may report
    /// holes with structured or extended replies only, and need not do so.
    ///
    /// # Errors
    ///
    /// See the start of this section.
    ///
    /// # Cancel safety
    ///
    /// As for [`Client::read`].
    pub async fn read_chunks(&self, range: Range<u64>) -> Result<Vec<ReadChunk>> {
        self.read_chunks_into(range, &ReadMemory::default()).await
    }

    /// Like [`Client::read_chunks`], into memory of earlier answers. Saves the page faults of fresh
    /// memory in bulk reads.
    ///
    /// # Errors
    ///
    /// See the start of this section.
    ///
    /// # Cancel safety
    ///
    /// As for [`Client::read`]; memory that is taken already is lost.
    pub async fn read_chunks_into(
        &self,
        range: Range<u64>,
        memory: &ReadMemory,
    ) -> Result<Vec<ReadChunk>> {
        let total = self.check_range(&range)?;
        let mut replies = Vec::new();
        for (offset, length) in split(range.start, total, self.longest_payload()) {
            let command = Command::Read(Fragmentation::Allowed);
            let collect = Collect::Chunks(Vec::new(), memory.clone());
            let request = NewRequest { collect, ..NewRequest::plain(offset, length, command) };
            replies.push(self.submit(request).await?);
        }
        let mut chunks = Vec::new();
        for reply in replies {
            if let Outcome::Chunks(more) = reply.outcome().await? {
                chunks.extend(more);
            }
        }
        Ok(chunks)
    }

    async fn read_once(&self, offset: u64, length: u64) -> Result<Bytes> {
        let reply = self.submit(flat_read(offset, length)).await?;
        Ok(data(reply.outcome().await?))
    }

    /// Writes `data` at `offset`. Writes longer than the server's maximum are split; if one part
    /// fails, others may have been carried out.
    ///
    /// # Errors
    ///
    /// See the start of this section; FUA needs a server with
    /// [`SEND_FUA`](TransmissionFlags::SEND_FUA).
    ///
    /// # Cancel safety
    ///
    /// The connection remains usable, but the write may or may not be carried out, as for every
    /// method that changes the export.
    pub async fn write(&self, offset: u64, data: Bytes, durability: Durability) -> Result<()> {
        let total = data.len() as u64;
        self.check(offset, total)?;
        let most = self.longest_payload();
        let mut data = data;
        let mut replies = Vec::new();
        for (offset, length) in split(offset, total, most) {
            let payload = data.split_to(length as usize);
            let request = NewRequest::plain(offset, length, Command::Write(durability));
            let reply = self.submit(NewRequest { payload, ..request }).await?;
            replies.push(reply);
        }
        for reply in replies {
            reply.outcome().await?;
        }
        Ok(())
    }

    /// Makes all writes durable that were complete before the call, on all connections.
    ///
    /// # Errors
    ///
    /// See the start of this section; needs [`SEND_FLUSH`](TransmissionFlags::SEND_FLUSH).
    ///
    /// # Cancel safety
    ///
    /// Safe, but the writes may or may not be durable.
    pub async fn flush(&self) -> Result<()> {
        self.submit(NewRequest::plain(0, 0, Command::Flush)).await?.outcome().await?;
        Ok(())
    }

    /// Discards the range: the server may free its space, and the contents are undefined
    /// afterwards. Needs [`SEND_TRIM`](TransmissionFlags::SEND_TRIM).
    ///
    /// # Errors
    ///
    /// See the start of this section.
    ///
    /// # Cancel safety
    ///
    /// As for [`Client::write`].
    pub async fn trim(&self, range: Range<u64>, durability: Durability) -> Result<()> {
        self.plain(range, self.longest_range(), &Command::Trim(durability)).await
    }

    /// Asks the server to prefetch the range. Needs [`SEND_CACHE`](TransmissionFlags::SEND_CACHE).
    ///
    /// # Errors
    ///
    /// See the start of this section.
    ///
    /// # Cancel safety
    ///
    /// Safe.
    pub async fn cache(&self, range: Range<u64>) -> Result<()> {
        // Servers apply the limit of READ to CACHE although no data is sent.
        self.plain(range, self.longest_payload(), &Command::Cache).await
    }

    /// Makes the range read as zeroes. Needs
    /// [`SEND_WRITE_ZEROES`](TransmissionFlags::SEND_WRITE_ZEROES). With [`Speed::FastOnly`], which
    /// needs [`SEND_FAST_ZERO`](TransmissionFlags::SEND_FAST_ZERO), a server that would have to
    /// write zeroes answers ENOTSUP at once.
    ///
    /// # Errors
    ///
    /// See the start of this section.
    ///
    /// # Cancel safety
    ///
    /// As for [`Client::write`].
    pub async fn write_zeroes(
        &self,
        range: Range<u64>,
        mode: ZeroMode,
        speed: Speed,
        durability: Durability,
    ) -> Result<()> {
        let command = Command::WriteZeroes(mode, speed, durability);
        self.plain(range, self.longest_range(), &command).await
    }

    /// Queries the status of the start of the range in every selected metadata context. The server
    /// decides how much each answer covers: at least one descriptor, at most the range. An empty
    /// range has no descriptors.
    /// [`Client::extents`] repeats the query until the complete range is covered.
    ///
    /// # Errors
    ///
    /// See the start of this section; needs a server with metadata contexts and a
    /// [`Connector`](crate::Connector) that selected some.
    ///
    /// # Cancel safety
    ///
    /// Safe.
    pub async fn block_status(
        &self,
        range: Range<u64>,
        limit: ExtentLimit,
    ) -> Result<Vec<(MetaContextName, Vec<BlockDescriptor>)>> {
        let statuses = self.status(range, limit, None).await?;
        let name = |context: usize| self.meta_contexts().get(context).cloned();
        let named = |(context, descriptors)| Some((name(context)?, descriptors));
        Ok(statuses.into_iter().filter_map(named).collect())
    }

    /// Queries the status in one context (by its index in the list) or in all.
    pub(crate) async fn status(
        &self,
        range: Range<u64>,
        limit: ExtentLimit,
        context: Option<usize>,
    ) -> Result<Vec<(usize, Vec<BlockDescriptor>)>> {
        let length = self.check_range(&range)?;
        if length == 0 {
            let contexts = 0..self.meta_contexts().len();
            return Ok(contexts.map(|context| (context, Vec::new())).collect());
        }
        let selects = self.negotiated().flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
        // For a single context, the selection would only cost bytes.
        let context = context.filter(|_| selects && self.meta_contexts().len() > 1);
        let length = length.min(self.longest_range());
        let collect = Collect::Status(Vec::new());
        let request = NewRequest::plain(range.start, length, Command::BlockStatus(limit, None));
        let reply = self.submit(NewRequest { context, collect, ..request }).await?;
        match reply.outcome().await? {
            Outcome::Status(statuses) => Ok(statuses),
            _ => Ok(Vec::new()),
        }
    }

    /// Carries out a command without data in parts of at most `most` bytes.
    async fn plain(&self, range: Range<u64>, most: u64, command: &Command) -> Result<()> {
        let length = self.check_range(&range)?;
        for (offset, length) in split(range.start, length, most) {
            let request = NewRequest::plain(offset, length, command.clone());
            self.submit(request).await?.outcome().await?;
        }
        Ok(())
    }

    /// Checks the complete range before anything is sent, so that a split request fails before its
    /// first part. Returns the length, in bytes.
    fn check_range(&self, range: &Range<u64>) -> Result<u64, ApiMisuse> {
        let Range { start, end } = *range;
        let length = end.checked_sub(start).ok_or(ApiMisuse::ReversedRange { start, end })?;
        self.check(start, length)?;
        Ok(length)
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), ApiMisuse> {
        let size = self.negotiated().size;
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(ApiMisuse::OutOfBounds { offset, length, size });
        }
        let minimum = self.negotiated().block_sizes.minimum();
        if (offset | length) & u64::from(minimum).saturating_sub(1) != 0 {
            return Err(ApiMisuse::Unaligned { offset, length, minimum });
        }
        Ok(())
    }

    /// Longest READ or WRITE, in bytes: the server's maximum, but at most 32 MiB.
    fn longest_payload(&self) -> u64 {
        let sizes = &self.negotiated().block_sizes;
        let most = sizes.maximum_payload().min(MAX_PAYLOAD);
        u64::from(most & !sizes.minimum().saturating_sub(1))
    }

    /// Longest range of a request without data, in bytes.
    fn longest_range(&self) -> u64 {
        if self.reply_mode() == ReplyMode::Extended { u64::MAX } else { LONGEST_COMPACT }
    }
}

fn flat_read(offset: u64, length: u64) -> NewRequest {
    let command = Command::Read(Fragmentation::Allowed);
    let collect = Collect::Flat(BytesMut::new());
    NewRequest { collect, ..NewRequest::plain(offset, length, command) }
}

fn data(outcome: Outcome) -> Bytes {
    match outcome {
        Outcome::Data(data) => data,
        _ => Bytes::new(),
    }
}

/// Splits a range inside the export into parts of at most `most` bytes.
fn split(offset: u64, length: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let part = most.min(length - done);
        let start = offset + done;
        done += part;
        (part > 0).then_some((start, part))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_split_without_gaps_and_its_last_part_is_what_is_left() {
        assert_eq!(split(10, 25, 10).collect::<Vec<_>>(), [(10, 10), (20, 10), (30, 5)]);
        assert_eq!(split(10, 20, 10).collect::<Vec<_>>(), [(10, 10), (20, 10)]);
        assert_eq!(split(10, 5, u64::MAX).collect::<Vec<_>>(), [(10, 5)]);
        assert_eq!(split(10, 0, 10).count(), 0);
    }
}
