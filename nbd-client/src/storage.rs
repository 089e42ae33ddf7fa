//! Exports of servers as storage for images (feature `image`).

mod extents;

use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use imgfmt::storage::StorageExtent;
use imgfmt::{
    Capabilities, Durability, ExtentKind, HostOffset, LostBytes, Speed, Storage, ZeroMode,
};
use nbd_proto::transmission;
use nbd_proto::wire::{Errno, MetaContextName, TransmissionFlags};

use crate::blocking::{Client, Interrupter};
use crate::connector::Connector;
use crate::error::{Error, Result};
use crate::inflight::ReadChunk;

/// An export of a server as a [`Storage`]: for an image on a server, or a layer or data file of
/// one.
///
/// ```
/// # fn example(uri: &str) -> Result<(), Box<dyn std::error::Error>> {
/// use std::sync::Arc;
///
/// use imgfmt::{Format, GuestOffset, Image, OpenOptions};
/// use nbd_client::{Connector, ExportStorage};
///
/// let connector: Connector = uri.parse()?;
/// let storage = Arc::new(ExportStorage::open(&connector)?);
/// let image = Image::from_storage(storage, &OpenOptions::new().format(Format::Raw))?;
/// let mut sector = [0; 512];
/// image.read_at(GuestOffset::new(0), &mut sector)?;
/// # Ok(()) }
/// ```
///
/// Its methods block, like those of [`blocking::Client`](Client). Requests that violate the
/// server's minimum block size are widened: reads are cut to the requested range, and a write to a
/// part of a block first reads the rest of the block. Concurrent writes of other clients to the
/// same block are not detected.
///
/// Block status is cached until the next write through this value; changes by other clients in
/// between are not noticed. Errors of the server and of the connection are the sources of the
/// [`io::Error`]s, as [`Error`].
///
/// Dropping it ends the connection, and waits up to 5 s for the end.
pub struct ExportStorage {
    client: Client,
    uri: String,
    /// Alignment of requests, in bytes; a power of two.
    minimum_size: u64,
    reports_extents: bool,
    /// The latest known status of a part of the disk.
    extents: Mutex<Vec<Known>>,
    /// Held during a change of a part of a block.
    partial_write: Mutex<()>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    start: u64,
    end: u64,
    kind: ExtentKind,
}

impl ExportStorage {
    /// Connects to the server, and selects `base:allocation` besides the metadata contexts of the
    /// connector.
    ///
    /// # Errors
    ///
    /// As for [`blocking::Client::connect`](Client::connect).
    pub fn open(connector: &Connector) -> Result<Self> {
        Self::open_interruptible(connector, &Interrupter::new())
    }

    /// Connects; `interrupter` can cancel this call and all later requests.
    ///
    /// # Errors
    ///
    /// As for [`blocking::Client::connect_interruptible`](Client::connect_interruptible).
    pub fn open_interruptible(connector: &Connector, interrupter: &Interrupter) -> Result<Self> {
        let context = MetaContextName::base_allocation();
        let mut connector = connector.clone();
        let contexts = &mut connector.settings.wanted.meta_contexts;
        if !contexts.contains(&context) {
            contexts.insert(0, context.clone());
        }
        let client = Client::connect_interruptible(&connector, interrupter)?;
        let sizes = client.info().block_sizes;
        Ok(Self {
            minimum_size: sizes.map_or(1, |sizes| u64::from(sizes.minimum())),
            reports_extents: client.meta_contexts().contains(&context),
            client,
            uri: connector.uri().to_string(),
            extents: Mutex::default(),
            partial_write: Mutex::default(),
        })
    }

    /// Returns the client. The storage does not know of writes through it: write through one of the
    /// two only.
    #[must_use]
    pub const fn client(&self) -> &Client {
        &self.client
    }

    /// Returns true if the server allows writing.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        !self.flags().contains(TransmissionFlags::READ_ONLY)
    }

    /// Returns true if the server can free space (TRIM).
    #[must_use]
    pub fn can_trim(&self) -> bool {
        self.flags().contains(TransmissionFlags::SEND_TRIM)
    }

    /// Returns true if the server reports zeroes (`base:allocation`).
    #[must_use]
    pub const fn reports_extents(&self) -> bool {
        self.reports_extents
    }

    /// Reads a range, in bytes, as data and holes, in ascending order and without gaps. Holes are
    /// those at the time of the request.
    ///
    /// # Errors
    ///
    /// If the request fails.
    pub fn read_chunks(&self, range: Range<u64>) -> io::Result<Vec<ReadChunk>> {
        let asked = self.aligned(range.start, range.end.saturating_sub(range.start));
        let read = self.client.read_chunks(asked).map_err(io_error)?;
        let mut position = range.start;
        let mut inside = Vec::with_capacity(read.len());
        for chunk in read.into_iter().filter_map(|chunk| clipped(chunk, &range)) {
            // A gap would be mistaken for zeroes.
            if chunk.offset() != position {
                break;
            }
            position += chunk.length();
            inside.push(chunk);
        }
        match position == range.end {
            true => Ok(inside),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Frees the space of a range, in bytes, rounded inwards to the server's blocks.
    ///
    /// # Errors
    ///
    /// If the request fails.
    pub fn trim(&self, range: Range<u64>, durability: Durability) -> io::Result<()> {
        let end = range.end.min(self.size());
        let start = range.start.checked_next_multiple_of(self.minimum_size).unwrap_or(end);
        let stop =
            if end == self.size() { end } else { end / self.minimum_size * self.minimum_size };
        if start < stop {
            let durability = self.durability(durability);
            self.changing(|client| client.trim(start..stop, durability)).map_err(io_error)?;
        }
        self.sync_instead(durability)
    }

    /// The requests that make a change durable: without FUA a flush follows.
    fn durability(&self, wanted: Durability) -> transmission::Durability {
        match wanted {
            Durability::Fua if self.flags().contains(TransmissionFlags::SEND_FUA) => {
                transmission::Durability::Fua
            }
            _ => transmission::Durability::Cached,
        }
    }

    fn sync_instead(&self, wanted: Durability) -> io::Result<()> {
        let has_fua = self.flags().contains(TransmissionFlags::SEND_FUA);
        if wanted == Durability::Fua && !has_fua { self.sync() } else { Ok(()) }
    }

    fn flags(&self) -> TransmissionFlags {
        self.client.info().flags
    }

    fn size(&self) -> u64 {
        self.client.info().size
    }

    /// Returns the smallest aligned range around this one.
    fn aligned(&self, offset: u64, length: u64) -> Range<u64> {
        let end = offset.saturating_add(length);
        let stop = end.checked_next_multiple_of(self.minimum_size).unwrap_or(end);
        offset / self.minimum_size * self.minimum_size..stop.min(self.size()).max(end)
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> io::Result<()> {
        let wanted = self.durability(durability);
        self.changing(|client| client.write(offset, data, wanted)).map_err(io_error)?;
        self.sync_instead(durability)
    }

    /// Sends a request that changes the disk.
    fn changing(&self, request: impl FnOnce(&Client) -> Result<()>) -> Result<()> {
        let result = request(&self.client);
        // Invalidated afterwards: a status that another thread received in the meantime may predate
        // the change.
        self.extents.lock().unwrap_or_else(PoisonError::into_inner).clear();
        result
    }

    fn zeroes(
        &self,
        range: Range<u64>,
        mode: transmission::ZeroMode,
        speed: transmission::Speed,
    ) -> io::Result<()> {
        let flags = self.flags();
        let is_aligned = range.start.is_multiple_of(self.minimum_size)
            && range.end.is_multiple_of(self.minimum_size);
        let wants_fast = speed == transmission::Speed::FastOnly;
        if !is_aligned
            || !flags.contains(TransmissionFlags::SEND_WRITE_ZEROES)
            || wants_fast && !flags.contains(TransmissionFlags::SEND_FAST_ZERO)
        {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let durability = transmission::Durability::Cached;
        let zeroed = self.changing(|client| client.write_zeroes(range, mode, speed, durability));
        zeroed.map_err(|error| match error.errno() {
            // Some servers advertise the command and then refuse it.
            Some(Errno::EINVAL | Errno::ENOTSUP) => io::ErrorKind::Unsupported.into(),
            _ => io_error(error),
        })
    }
}

/// The part of a chunk that is in a range.
fn clipped(chunk: ReadChunk, range: &Range<u64>) -> Option<ReadChunk> {
    let at = chunk.offset();
    let offset = at.max(range.start);
    let stop = at.saturating_add(chunk.length()).min(range.end);
    let length = stop.checked_sub(offset).filter(|length| *length > 0)?;
    Some(match chunk {
        ReadChunk::Data { data, .. } => {
            // Both are within the data.
            let data = data.slice((offset - at) as usize..(stop - at) as usize);
            ReadChunk::Data { offset, data }
        }
        ReadChunk::Hole { .. } => ReadChunk::Hole { offset, length },
    })
}

fn io_error(error: Error) -> io::Error {
    match error.errno() {
        Some(Errno::ENOSPC) => io::ErrorKind::StorageFull.into(),
        // The server answers, and cannot read there.
        Some(Errno::EIO) => io::Error::other(LostBytes(Box::new(error))),
        _ => io::Error::other(error),
    }
}

impl Storage for ExportStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.size())
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let offset = offset.bytes();
        let length = self.size().saturating_sub(offset).min(buffer.len() as u64);
        // At most the length of the buffer.
        let Some(inside @ [_, ..]) = buffer.get_mut(..length as usize) else { return Ok(0) };
        let asked = self.aligned(offset, length);
        if asked == (offset..offset + length) {
            self.client.read_into(offset, inside).map_err(io_error)?;
        } else {
            let skipped = (offset - asked.start) as usize;
            let data = self.client.read(asked).map_err(io_error)?;
            let wanted = data.get(skipped..skipped + inside.len());
            inside.copy_from_slice(wanted.ok_or(io::ErrorKind::UnexpectedEof)?);
        }
        Ok(inside.len())
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()> {
        let offset = offset.bytes();
        let around = self.aligned(offset, data.len() as u64);
        if around.end > self.size() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let length = around.end - around.start;
        if length == data.len() as u64 {
            return self.write(offset, Bytes::copy_from_slice(data), durability);
        }
        let _held = self.partial_write.lock().unwrap_or_else(PoisonError::into_inner);
        // The data and less than two blocks.
        let mut whole = vec![0; length as usize];
        self.client.read_into(around.start, &mut whole).map_err(io_error)?;
        let place = whole.get_mut((offset - around.start) as usize..);
        let place = place.and_then(|place| place.get_mut(..data.len()));
        place.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(data);
        self.write(around.start, whole.into(), durability)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        match length == self.size() {
            true => Ok(()),
            false => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        let range = offset.bytes()..offset.bytes().saturating_add(length);
        self.zeroes(range, transmission::ZeroMode::MayUnmap, transmission::Speed::Any)
    }

    fn write_zeroes(
        &self,
        offset: HostOffset,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
    ) -> io::Result<()> {
        let mode = match mode {
            ZeroMode::MayUnmap => transmission::ZeroMode::MayUnmap,
            ZeroMode::KeepAllocated => transmission::ZeroMode::KeepAllocated,
        };
        let wanted = match speed {
            Speed::Any => transmission::Speed::Any,
            Speed::FastOnly => transmission::Speed::FastOnly,
        };
        let mut position = offset.bytes();
        let end = position.saturating_add(length);
        match self.zeroes(position..end, mode, wanted) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported && speed == Speed::Any => {}
            other => return other,
        }
        let zeroes = [0; 64 << 10];
        while position < end {
            let part = (end - position).min(zeroes.len() as u64);
            let data = zeroes.get(..part as usize).unwrap_or(&zeroes);
            self.write_at(HostOffset::new(position), data, Durability::Cached)?;
            position += part;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        // Writes on a server without FLUSH are as durable as they will get.
        let can_flush = self.flags().contains(TransmissionFlags::SEND_FLUSH);
        if can_flush && self.is_writable() { self.client.flush().map_err(io_error) } else { Ok(()) }
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        capabilities.fast_zero = self.flags().contains(TransmissionFlags::SEND_FAST_ZERO);
        capabilities.discard = self.flags().contains(TransmissionFlags::SEND_WRITE_ZEROES);
        // Block sizes are 32-bit numbers.
        capabilities.minimum_size = self.minimum_size as u32;
        capabilities.preferred_size = capabilities.preferred_size.max(capabilities.minimum_size);
        capabilities
    }

    fn next_extent(&self, offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        self.extent_at(offset.bytes(), length)
    }
}

impl Drop for ExportStorage {
    fn drop(&mut self) {
        // Every request was answered, so the way in which the connection ends does not matter.
        drop(self.client.clone().disconnect());
    }
}

impl std::fmt::Debug for ExportStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExportStorage").field("uri", &self.uri).finish_non_exhaustive()
    }
}
