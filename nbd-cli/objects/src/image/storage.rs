//! An object as the storage of an image.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use imgfmt::storage::TryRead;
use imgfmt::{Capabilities, HostOffset, Storage};
use object_store::{Attribute, GetOptions, GetRange, GetResult};
use openssl::sha::Sha256;

use crate::error::{Result, StoreError, StoreErrorKind};
use crate::location::StoreUrl;
use crate::runtime::{LOOK_EVERY, boxed};
use crate::settings::StoreSettings;
use crate::shown::shown;
use crate::store::Place;

use super::cache_file::{BLOCK_LEN, Key};
use super::fetch::{ObjectCache, PinnedObject};
use super::sequences::{AHEAD_MAX, Sequences};

/// Blocks that may have to be read again because they gave way before they were read.
const TRIES: usize = 8;

/// Says whether waits are to end.
pub type Interrupted = Arc<dyn Fn() -> bool + Send + Sync>;

/// An object as a read-only [`Storage`].
///
/// It is the object that was there when it was opened: if another one takes its name, reads of what
/// is not in the cache fail, so that the two are never mixed.
///
/// Its methods block, at longest for the time limits of [`StoreSettings`]; `try_read_at` does not.
/// Neighbouring blocks are fetched by one request, and sequential readers find the next blocks
/// fetched already. The sources of the [`io::Error`]s are [`StoreError`]s.
pub struct ObjectStorage {
    object: Arc<PinnedObject>,
    cache: ObjectCache,
    sequences: Mutex<Sequences>,
    is_interrupted: Interrupted,
}

impl ObjectStorage {
    /// Opens an object by one request, for its first block.
    ///
    /// # Errors
    ///
    /// If the object cannot be read; if the store ignores ranges, or gives no ETag by which a
    /// replaced object could be noticed; if the settings are wrong.
    pub fn open(
        url: &StoreUrl,
        settings: &StoreSettings,
        cache: &ObjectCache,
        is_interrupted: Interrupted,
    ) -> Result<Self> {
        if let StoreUrl::S3 { bucket, key } = url
            && key.is_empty()
        {
            let why = format!("s3://{bucket} does not name an object; write s3://{bucket}/key");
            return Err(StoreError::invalid(why));
        }
        let place = Place::open(url, settings)?;
        let opened = open(place, cache.clone());
        let object = Arc::new(complete(cache, opened, &is_interrupted)??);
        let (cache, sequences) = (cache.clone(), Mutex::default());
        Ok(Self { object, cache, sequences, is_interrupted })
    }

    /// Returns the address of the object.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.object.place.name
    }

    /// Notes a read, and begins to read ahead. Returns the blocks that are read.
    fn note(&self, offset: u64, length: usize) -> (Range<u64>, Range<u64>) {
        let end = offset.saturating_add(length as u64);
        let blocks = offset / BLOCK_LEN as u64..end.div_ceil(BLOCK_LEN as u64);
        let mut sequences = self.sequences.lock().unwrap_or_else(PoisonError::into_inner);
        let ahead = sequences.read(blocks.clone(), self.object.blocks(), self.cache.ahead_max());
        (blocks, ahead)
    }

    /// Reads a part of one block.
    fn read_block(&self, block: u64, offset: usize, buffer: &mut [u8]) -> Result<()> {
        let key = Key { object: self.object.id, block };
        for _ in 0..TRIES {
            if self.cache.cache.read(key, offset, buffer) {
                return Ok(());
            }
            if let Some(flight) = self.cache.flights.get(key) {
                let data = flight.wait(&*self.is_interrupted)?;
                let part = data.get(offset..).and_then(|data| data.get(..buffer.len()));
                let part = part.ok_or_else(|| self.too_short())?;
                buffer.copy_from_slice(part);
                flight.note_read(offset, buffer.len());
                return Ok(());
            }
            self.cache.launch(&self.object, block..block + 1);
        }
        Err(self.too_short())
    }

    fn too_short(&self) -> StoreError {
        let why = format!("cannot read {}: its blocks arrive and are lost again", self.name());
        StoreError::new(StoreErrorKind::Unavailable, why)
    }

    /// The length of a read that begins at `offset`, cut at the end of the object.
    fn cut(&self, offset: u64, length: usize) -> usize {
        let left = self.object.size.saturating_sub(offset);
        usize::try_from(left).map_or(length, |left| left.min(length))
    }
}

/// Parts of a buffer by block: the block, the offset in it, the part.
fn by_block(offset: u64, mut buffer: &mut [u8]) -> impl Iterator<Item = (u64, usize, &mut [u8])> {
    let mut position = offset;
    std::iter::from_fn(move || {
        if buffer.is_empty() {
            return None;
        }
        let within = usize::try_from(position % BLOCK_LEN as u64).unwrap_or(0);
        let length = buffer.len().min(BLOCK_LEN - within);
        let (part, rest) = std::mem::take(&mut buffer).split_at_mut(length);
        let block = position / BLOCK_LEN as u64;
        position += length as u64;
        buffer = rest;
        Some((block, within, part))
    })
}

impl Storage for ObjectStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.object.size)
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let offset = offset.bytes();
        let length = self.cut(offset, buffer.len());
        if length == 0 {
            return Ok(0);
        }
        let (blocks, ahead) = self.note(offset, length);
        // One range, if what is read ahead follows what is read.
        let is_next = ahead.start == blocks.end;
        self.cache.launch(&self.object, blocks.start..if is_next { ahead.end } else { blocks.end });
        if !is_next {
            self.cache.launch(&self.object, ahead);
        }
        for (block, within, part) in by_block(offset, &mut buffer[..length]) {
            self.read_block(block, within, part)?;
        }
        Ok(length)
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        let offset = offset.bytes();
        if buffer.is_empty() || self.cut(offset, buffer.len()) < buffer.len() {
            return Ok(TryRead::WouldBlock);
        }
        let length = buffer.len();
        for (block, within, part) in by_block(offset, buffer) {
            let key = Key { object: self.object.id, block };
            if !self.cache.cache.try_read(key, within, part) {
                // It may have just arrived.
                let flight = self.cache.flights.get(key).unwrap_or_default();
                let landed = flight.landed();
                let data = landed.as_ref().and_then(|data| data.get(within..within + part.len()));
                let Some(data) = data else { return Ok(TryRead::WouldBlock) };
                part.copy_from_slice(data);
                flight.note_read(within, part.len());
            }
        }
        let (_, ahead) = self.note(offset, length);
        self.cache.launch(&self.object, ahead);
        Ok(TryRead::Complete)
    }

    fn readahead(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        let first = offset.bytes() / BLOCK_LEN as u64;
        let end = offset.bytes().saturating_add(length).div_ceil(BLOCK_LEN as u64);
        let end = end.min(first.saturating_add(AHEAD_MAX)).min(self.object.blocks());
        if self.cache.ahead_max() > 0 {
            self.cache.launch(&self.object, first..end);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        capabilities.preferred_size = 64 << 10;
        capabilities
    }
}

impl fmt::Debug for ObjectStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ObjectStorage").field(&self.name()).finish()
    }
}

/// Opens an object, and keeps its first block.
async fn open(place: Place, cache: ObjectCache) -> Result<PinnedObject> {
    let failed = |error: &object_store::Error| StoreError::of("open", &place.name, error);
    let range = Some(GetRange::Bounded(0..BLOCK_LEN as u64));
    let options = GetOptions { range, ..GetOptions::default() };
    let reply = place.store.get_opts(&place.path, options).await.map_err(|error| failed(&error))?;
    let (etag, size) = pinned(&place.name, &reply)?;
    let mut digest = Sha256::new();
    for part in [place.identity.as_bytes(), etag.as_bytes(), &size.to_le_bytes()] {
        digest.update(&(part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    let mut id = [0; 16];
    id.copy_from_slice(&digest.finish()[..16]);
    let data = reply.bytes().await.map_err(|error| failed(&error))?;
    let object = PinnedObject { place, etag, size, id };
    if data.len() != object.block_len(0) {
        let name = &object.place.name;
        let why = format!("cannot open {name}: the store has sent less than it was asked for");
        return Err(StoreError::new(StoreErrorKind::Unavailable, why));
    }
    cache.keep(Key { object: id, block: 0 }, data).await;
    Ok(object)
}

/// Returns the ETag and the length of an object.
fn pinned(name: &str, reply: &GetResult) -> Result<(String, u64)> {
    let unsuitable = |why: &str| {
        let why = format!("cannot open {name}: {why}, so a replaced object could not be noticed");
        StoreError::new(StoreErrorKind::Unsuitable, why)
    };
    let encoding = reply.attributes.get(&Attribute::ContentEncoding).map_or("", |value| &**value);
    // Some stores keep what only the upload was.
    if !["", "identity", "aws-chunked"].contains(&encoding) {
        let why = format!(
            "cannot open {name}: the server says that it is compressed (Content-Encoding: {}); \
             store it without that",
            shown(encoding)
        );
        return Err(StoreError::new(StoreErrorKind::Unsuitable, why));
    }
    match reply.meta.e_tag.as_deref() {
        None | Some("" | "\"\"") => Err(unsuitable("the server gives no ETag")),
        Some(etag) if etag.starts_with("W/") => {
            Err(unsuitable("the server gives a weak ETag, which different contents may share"))
        }
        Some(etag) => Ok((etag.to_owned(), reply.meta.size)),
    }
}

/// Runs a request on the threads of requests, and waits for it. The calling thread may drive a
/// runtime.
fn complete<T: Send + 'static>(
    cache: &ObjectCache,
    work: impl Future<Output = T> + Send + 'static,
    is_interrupted: &Interrupted,
) -> Result<T> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let task = cache.runtime().spawn(boxed(async move { drop(sender.send(work.await)) }));
    loop {
        match receiver.recv_timeout(LOOK_EVERY) {
            Ok(outcome) => return Ok(outcome),
            Err(mpsc::RecvTimeoutError::Timeout) if !is_interrupted() => {}
            Err(mpsc::RecvTimeoutError::Timeout) => {
                task.abort();
                let why = "the request to the store was interrupted";
                return Err(StoreError::new(StoreErrorKind::Interrupted, why));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let why = "a request to the store was given up";
                return Err(StoreError::new(StoreErrorKind::Unavailable, why));
            }
        }
    }
}
