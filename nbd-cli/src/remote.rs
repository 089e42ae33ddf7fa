//! Exports of NBD servers as storages: where an image, or a layer of one, lies on a server.

use std::io;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use imgfmt::storage::StorageExtent;
use imgfmt::{
    Capabilities, Durability, ExtentKind, HostOffset, NameTarget, OpenPolicy, Speed, Storage,
    ZeroMode,
};
use nbd_client::{Client, Connector, Error, ExtentLimit, LocalFiles, ReadChunk};
use nbd_proto::NbdUri;
use nbd_proto::wire::{
    AllocationFlags, BlockDescriptor, Errno, MetaContextName, TransmissionFlags,
};
use tokio::runtime::Runtime;

use crate::connect::{ServerArgs, connect};
use crate::error::{CommandError, runtime};
use crate::output::printable;
use crate::server_name::{JSON_SCHEME, NameInImage, SCHEMES, from_name_in_image};
use crate::signals;

/// Connections to a server that allows several.
const CONNECTIONS: NonZeroUsize = NonZeroUsize::new(4).expect("it is not zero");

/// Lets images name exports as their backing or data files.
pub(crate) fn allow_exports(policy: OpenPolicy, server: &ServerArgs) -> OpenPolicy {
    SCHEMES.iter().chain([&JSON_SCHEME]).fold(policy, |policy, scheme| {
        let server = server.clone();
        let reader = move |name: &str| {
            let uri = match from_name_in_image(name).map_err(io::Error::other)? {
                NameInImage::File(path) => return Ok(NameTarget::File(path)),
                NameInImage::Export(uri) => uri,
            };
            let storage = open_named_by_image(&uri, &server);
            let storage = storage.map_err(|error| io::Error::other(error.to_string()))?;
            Ok(NameTarget::Storage(Arc::new(storage)))
        };
        policy.read_scheme(*scheme, Arc::new(reader))
    })
}

/// Lets images name files by the options of QEMU's driver `file` where the policy allows the file.
pub(crate) fn allow_json_files(policy: OpenPolicy) -> OpenPolicy {
    let reader = |name: &str| match from_name_in_image(name).map_err(io::Error::other)? {
        NameInImage::File(path) => Ok(NameTarget::File(path)),
        NameInImage::Export(_) => Ok(NameTarget::Denied),
    };
    policy.read_scheme(JSON_SCHEME, Arc::new(reader))
}

/// Connects to an export that an image names.
pub(crate) fn open_named_by_image(
    uri: &NbdUri,
    server: &ServerArgs,
) -> Result<ExportStorage, CommandError> {
    // The image chose this URI: it may not choose which files of this machine are read.
    let connector = server.connector(uri).local_files(LocalFiles::Refused);
    ExportStorage::open(connector)
}

/// An export of a server. Its methods wait, so they must not be called by asynchronous tasks.
pub(crate) struct ExportStorage {
    /// Gone only while this is dropped.
    runtime: Option<Runtime>,
    client: Client,
    uri: NbdUri,
    /// Requests must be aligned to this power of two.
    minimum_size: u64,
    has_extents: bool,
    /// What the server said last about a part of the disk.
    extents: Mutex<Vec<Known>>,
    /// Held while a part of a block is changed.
    partial_write: Mutex<()>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    start: u64,
    end: u64,
    kind: ExtentKind,
}

impl ExportStorage {
    /// Connects to the server.
    pub(crate) fn open(connector: Connector) -> Result<Self, CommandError> {
        Self::with_contexts(connector, Vec::new())
    }

    /// Connects to the server and selects those of `more` metadata contexts that it offers.
    pub(crate) fn with_contexts(
        connector: Connector,
        more: Vec<MetaContextName>,
    ) -> Result<Self, CommandError> {
        let runtime = runtime()?;
        let context = MetaContextName::base_allocation();
        let contexts = std::iter::once(context.clone()).chain(more);
        let connector = connector.connections(CONNECTIONS).meta_contexts(contexts);
        let uri = connector.uri();
        let client = waiting(&runtime, connect(&connector, uri))?;
        let sizes = client.info().block_sizes;
        Ok(Self {
            minimum_size: sizes.map_or(1, |sizes| u64::from(sizes.minimum())),
            has_extents: client.meta_contexts().contains(&context),
            runtime: Some(runtime),
            client,
            uri: uri.clone(),
            extents: Mutex::default(),
            partial_write: Mutex::default(),
        })
    }

    /// Its client, which tells how often a connection was replaced.
    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    /// Whether the server lets clients write.
    pub(crate) fn is_writable(&self) -> bool {
        !self.flags().contains(TransmissionFlags::READ_ONLY)
    }

    /// Whether data can be made durable.
    pub(crate) fn can_flush(&self) -> bool {
        self.flags().contains(TransmissionFlags::SEND_FLUSH)
    }

    /// Whether space can be given back by a request of its own.
    pub(crate) fn can_trim(&self) -> bool {
        self.flags().contains(TransmissionFlags::SEND_TRIM)
    }

    /// Whether the server tells where the disk is zero.
    pub(crate) const fn has_extents(&self) -> bool {
        self.has_extents
    }

    /// The metadata contexts that were selected.
    pub(crate) fn meta_contexts(&self) -> &[MetaContextName] {
        self.client.meta_contexts()
    }

    /// What the server says about the start of a range in a context that was selected.
    ///
    /// # Errors
    ///
    /// If it says nothing, or the connection fails.
    pub(crate) fn status(
        &self,
        context: &MetaContextName,
        offset: u64,
        length: u64,
    ) -> io::Result<Vec<BlockDescriptor>> {
        let (start, stop) = self.aligned(offset, length);
        let asked = self.client.block_status(start..stop, ExtentLimit::Many);
        let found = self.wait(asked)?.into_iter().find(|(name, _)| name == context);
        let end = offset.saturating_add(length);
        let mut position = start;
        let mut inside = Vec::new();
        for descriptor in found.map(|(_, descriptors)| descriptors).unwrap_or_default() {
            let begin = position.max(offset);
            position = position.saturating_add(descriptor.length);
            if let Some(length @ 1..) = position.min(end).checked_sub(begin) {
                inside.push(BlockDescriptor { length, ..descriptor });
            }
        }
        match inside.is_empty() {
            true => Err(io::Error::other("the server gave no status")),
            false => Ok(inside),
        }
    }

    /// Reads a range as what the server sends of it: data and holes, in order and without gaps. What it
    /// calls a hole is one at that moment.
    ///
    /// # Errors
    ///
    /// Whatever the server reports.
    pub(crate) fn read_pieces(&self, offset: u64, length: usize) -> io::Result<Vec<ReadChunk>> {
        let (start, stop) = self.aligned(offset, length as u64);
        let end = offset.saturating_add(length as u64);
        let read = self.wait(self.client.read_chunks(start..stop))?;
        let mut position = offset;
        let mut inside = Vec::with_capacity(read.len());
        for piece in read.into_iter().filter_map(|piece| clipped(piece, offset, end)) {
            let (at, length) = place(&piece);
            // A gap would be taken for zeroes.
            if at != position {
                break;
            }
            position += length;
            inside.push(piece);
        }
        match position == end {
            true => Ok(inside),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Gives the space of a range back, as far as the server's blocks lie within it.
    ///
    /// # Errors
    ///
    /// Whatever the server reports.
    pub(crate) fn trim(&self, offset: u64, length: u64, durability: Durability) -> io::Result<()> {
        let end = offset.saturating_add(length).min(self.size());
        let start = offset.checked_next_multiple_of(self.minimum_size).unwrap_or(end);
        let stop =
            if end == self.size() { end } else { end / self.minimum_size * self.minimum_size };
        if start < stop {
            self.forget_extents();
            let wanted = self.durability(durability);
            self.wait(self.client.trim(start..stop, wanted))?;
        }
        self.sync_instead(durability)
    }

    /// How durable a request is asked to be: a server without FUA gets a flush behind it.
    fn durability(&self, wanted: Durability) -> nbd_client::Durability {
        match wanted {
            Durability::Fua if self.flags().contains(TransmissionFlags::SEND_FUA) => {
                nbd_client::Durability::Fua
            }
            _ => nbd_client::Durability::Cached,
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

    /// Waits for an answer, unless a signal interrupts that.
    fn block_on<T>(&self, work: impl Future<Output = T>) -> io::Result<T> {
        let runtime = self.runtime.as_ref();
        let work = signals::unless_interrupted(async { Ok(work.await) });
        let done = waiting(runtime.ok_or(io::ErrorKind::NotConnected)?, work);
        done.map_err(|interrupted| io::Error::other(interrupted.to_string()))
    }

    fn wait<T>(&self, work: impl Future<Output = Result<T, Error>>) -> io::Result<T> {
        self.block_on(work)?.map_err(io_error)
    }

    /// The smallest aligned range around this one.
    fn aligned(&self, offset: u64, length: u64) -> (u64, u64) {
        let end = offset.saturating_add(length);
        let stop = end.checked_next_multiple_of(self.minimum_size).unwrap_or(end);
        (offset / self.minimum_size * self.minimum_size, stop.min(self.size()).max(end))
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> io::Result<()> {
        self.forget_extents();
        self.wait(self.client.write(offset, data, self.durability(durability)))?;
        self.sync_instead(durability)
    }

    fn forget_extents(&self) {
        self.extents.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Asks what is at `offset` and behind it.
    fn fetch(&self, offset: u64, length: u64) -> io::Result<Vec<Known>> {
        let (start, stop) = self.aligned(offset, length);
        let asked = self.client.block_status(start..stop, ExtentLimit::Many);
        let mut position = start;
        let contexts = self.wait(asked)?;
        let base =
            contexts.into_iter().find(|(name, _)| *name == MetaContextName::base_allocation());
        let descriptors = base.map(|(_, list)| list).unwrap_or_default();
        let known = descriptors.iter().map(|descriptor| {
            let flags = AllocationFlags::from_bits_truncate(descriptor.flags);
            let is_hole = flags.contains(AllocationFlags::STATE_HOLE);
            let kind = match flags.contains(AllocationFlags::STATE_ZERO) {
                true if is_hole => ExtentKind::Hole,
                true => ExtentKind::Zero,
                false => ExtentKind::Data,
            };
            let start = position;
            position = position.saturating_add(descriptor.length);
            Known { start, end: position, kind }
        });
        Ok(known.collect())
    }

    fn zeroes(
        &self,
        offset: u64,
        length: u64,
        mode: nbd_client::ZeroMode,
        speed: nbd_client::Speed,
    ) -> io::Result<()> {
        let flags = self.flags();
        let is_aligned =
            offset.is_multiple_of(self.minimum_size) && length.is_multiple_of(self.minimum_size);
        let wants_fast = speed == nbd_client::Speed::FastOnly;
        if !is_aligned
            || !flags.contains(TransmissionFlags::SEND_WRITE_ZEROES)
            || wants_fast && !flags.contains(TransmissionFlags::SEND_FAST_ZERO)
        {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.forget_extents();
        let durability = nbd_client::Durability::Cached;
        let work = self.client.write_zeroes(
            offset..offset.saturating_add(length),
            mode,
            speed,
            durability,
        );
        self.block_on(work)?.map_err(|error| match error.errno() {
            // Some servers promise it and then refuse.
            Some(Errno::EINVAL | Errno::ENOTSUP) => io::ErrorKind::Unsupported.into(),
            _ => io_error(error),
        })
    }
}

/// Offset and length of a piece, in bytes.
fn place(piece: &ReadChunk) -> (u64, u64) {
    match piece {
        ReadChunk::Data { offset, data } => (*offset, data.len() as u64),
        ReadChunk::Hole { offset, length } => (*offset, *length),
    }
}

/// The part of a piece that lies in a range.
fn clipped(piece: ReadChunk, start: u64, end: u64) -> Option<ReadChunk> {
    let (at, length) = place(&piece);
    let offset = at.max(start);
    let stop = at.saturating_add(length).min(end);
    let length = stop.checked_sub(offset).filter(|length| *length > 0)?;
    Some(match piece {
        ReadChunk::Data { data, .. } => {
            // Both lie within the data.
            ReadChunk::Data {
                offset,
                data: data.slice((offset - at) as usize..(stop - at) as usize),
            }
        }
        ReadChunk::Hole { .. } => ReadChunk::Hole { offset, length },
    })
}

/// Waits for work, also where the thread itself drives another runtime's tasks, as in `restore`.
fn waiting<T>(runtime: &Runtime, work: impl Future<Output = T>) -> T {
    tokio::task::block_in_place(|| runtime.block_on(work))
}

fn io_error(error: Error) -> io::Error {
    match error.errno() {
        Some(Errno::ENOSPC) => io::ErrorKind::StorageFull.into(),
        _ => io::Error::other(printable(&error.to_string())),
    }
}

impl Storage for ExportStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.size())
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let offset = offset.bytes();
        let length = self.size().saturating_sub(offset).min(buffer.len() as u64);
        if length == 0 {
            return Ok(0);
        }
        let (start, stop) = self.aligned(offset, length);
        let inside = &mut buffer[..length as usize];
        if stop - start == length {
            self.wait(self.client.read_into(offset, inside))?;
        } else {
            let data = self.wait(self.client.read(start..stop))?;
            inside.copy_from_slice(&data[(offset - start) as usize..][..length as usize]);
        }
        Ok(length as usize)
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()> {
        let offset = offset.bytes();
        let (start, stop) = self.aligned(offset, data.len() as u64);
        if stop > self.size() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        if stop - start == data.len() as u64 {
            return self.write(offset, Bytes::copy_from_slice(data), durability);
        }
        let _held = self.partial_write.lock().unwrap_or_else(PoisonError::into_inner);
        let mut whole = vec![0; (stop - start) as usize];
        self.wait(self.client.read_into(start, &mut whole))?;
        whole[(offset - start) as usize..][..data.len()].copy_from_slice(data);
        self.write(start, whole.into(), durability)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        match length == self.size() {
            true => Ok(()),
            false => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        let (mode, speed) = (nbd_client::ZeroMode::MayPunch, nbd_client::Speed::Any);
        self.zeroes(offset.bytes(), length, mode, speed)
    }

    fn write_zeroes(
        &self,
        offset: HostOffset,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
    ) -> io::Result<()> {
        let mode = match mode {
            ZeroMode::MayUnmap => nbd_client::ZeroMode::MayPunch,
            ZeroMode::KeepAllocated => nbd_client::ZeroMode::NoHole,
        };
        let wanted = match speed {
            Speed::Any => nbd_client::Speed::Any,
            Speed::FastOnly => nbd_client::Speed::FastOnly,
        };
        match self.zeroes(offset.bytes(), length, mode, wanted) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported && speed == Speed::Any => {}
            other => return other,
        }
        let zeroes = [0; 64 << 10];
        let mut position = offset.bytes();
        let end = position.saturating_add(length);
        while position < end {
            let part = (end - position).min(zeroes.len() as u64);
            self.write_at(HostOffset::new(position), &zeroes[..part as usize], Durability::Cached)?;
            position += part;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        // What a server without it writes is as durable as it ever gets.
        if self.can_flush() && self.is_writable() { self.wait(self.client.flush()) } else { Ok(()) }
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
        let offset = offset.bytes();
        let all_data = StorageExtent { length, kind: ExtentKind::Data };
        if !self.has_extents || offset >= self.size() {
            return Ok(all_data);
        }
        let mut known = self.extents.lock().unwrap_or_else(PoisonError::into_inner);
        let covers = |known: &&Known| known.start <= offset && offset < known.end;
        let mut found = known.iter().find(covers).copied();
        if found.is_none() {
            *known = self.fetch(offset, length.min(self.size() - offset))?;
            found = known.iter().find(covers).copied();
        }
        Ok(found.map_or(all_data, |known| StorageExtent {
            length: (known.end - offset).min(length),
            kind: known.kind,
        }))
    }
}

impl Drop for ExportStorage {
    fn drop(&mut self) {
        // Every request was answered; how the connection ends does not matter.
        let Some(runtime) = self.runtime.take() else { return };
        if signals::caught().is_some() {
            // A goodbye would wait for requests that were given up.
            return runtime.shutdown_background();
        }
        let client = self.client.clone();
        // On a thread of its own: a server that ends drops its exports in an asynchronous task.
        let goodbye = std::thread::spawn(move || {
            let _ = runtime.block_on(client.disconnect());
        });
        let _ = goodbye.join();
    }
}

impl std::fmt::Debug for ExportStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExportStorage").field("uri", &self.uri.to_string()).finish_non_exhaustive()
    }
}
