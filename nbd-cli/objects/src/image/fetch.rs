//! Fetches blocks of objects into the cache.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use object_store::{GetOptions, GetRange, GetResult};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::error::{Result, StoreError, StoreErrorKind};
use crate::runtime::{boxed, runtime};
use crate::store::Place;

use super::cache::{Cache, CacheSettings, Reads};
use super::cache_file::{BLOCK_LEN, Key};
use super::flights::{Flights, Landed, Run};
use super::held::Held;
use super::sequences::{AHEAD_MAX, RUN_MAX};
use super::spare::Spare;

/// Requests for blocks that are made at once. Each holds a few blocks in memory.
const REQUESTS_MAX: usize = 16;
/// Blocks of a request that have arrived and are not in the cache yet. A local disk that is slower
/// than the store holds the request up then.
const KEEPING_MAX: usize = 8;
/// Blocks that are written to the cache at once: its file takes one at a time.
const WRITES_MAX: usize = 2;

/// The cache of all objects of a process.
///
/// It is bounded, and kept on the local disk; a crash of the process costs blocks at most. Clones
/// are the same cache.
#[derive(Clone)]
pub struct ObjectCache {
    pub(super) cache: Arc<Cache>,
    pub(super) flights: Arc<Flights>,
    /// Blocks that are read once.
    held: Option<Arc<Held>>,
    spare: Arc<Spare>,
    requests: Arc<Semaphore>,
    writes: Arc<Semaphore>,
    runtime: Handle,
}

impl ObjectCache {
    /// Opens the cache, and starts the threads of requests.
    ///
    /// # Errors
    ///
    /// The directory cannot be used, and is not optional; or threads cannot be started.
    pub fn open(settings: &CacheSettings) -> Result<Self> {
        let runtime = runtime().map_err(|error| {
            StoreError::new(StoreErrorKind::Local, format!("cannot start threads: {error}"))
        })?;
        Ok(Self {
            cache: Arc::new(Cache::open(settings)?),
            flights: Arc::default(),
            held: (settings.reads == Reads::Once).then(Arc::default),
            spare: Arc::default(),
            requests: Arc::new(Semaphore::new(REQUESTS_MAX)),
            writes: Arc::new(Semaphore::new(WRITES_MAX)),
            runtime,
        })
    }

    pub(super) const fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Blocks that are read ahead for one reader, at most: a small cache has to keep them until
    /// they are read. None if they would be lost.
    pub(super) fn ahead_max(&self) -> u64 {
        match self.held {
            Some(_) => AHEAD_MAX,
            None => AHEAD_MAX.min(self.cache.capacity() / 4),
        }
    }

    /// Begins to fetch those blocks of a range that are missing.
    pub(super) fn launch(&self, object: &Arc<PinnedObject>, blocks: Range<u64>) {
        if blocks.is_empty() {
            return;
        }
        let is_there = |key| self.cache.contains(key);
        for run in self.flights.begin(object.id, blocks, RUN_MAX, is_there) {
            let (this, object) = (self.clone(), Arc::clone(object));
            self.runtime.spawn(boxed(async move { this.fetch(&object, run).await }));
        }
    }

    async fn fetch(&self, object: &PinnedObject, mut run: Run) {
        let permit = self.requests.acquire().await;
        if let Err(error) = self.fetch_run(object, &mut run).await {
            tracing::debug!(object = object.place.name, %error, "blocks cannot be fetched");
            run.fail(&error);
        }
        drop(permit);
    }

    async fn fetch_run(&self, object: &PinnedObject, run: &mut Run) -> Result<()> {
        let blocks = run.blocks();
        let range = object.range(&blocks);
        let reply = object.get(range.clone()).await?;
        let mut stream = reply.into_stream();
        let (mut block, mut keeping) = (Vec::new(), VecDeque::new());
        while let Some(data) = stream.next().await {
            let mut data = data.map_err(|error| object.failed(&error))?;
            while !data.is_empty() {
                let expected = object.block_len(run.key().block);
                if block.is_empty() {
                    block = self.spare.take();
                }
                let part = data.split_to(data.len().min(expected - block.len()));
                block.extend_from_slice(&part);
                if block.len() == expected {
                    let whole = self.spare.lend(std::mem::take(&mut block));
                    self.land(run.land(whole), &mut keeping).await;
                    if run.blocks().is_empty() {
                        while let Some(kept) = keeping.pop_front() {
                            let _ = kept.await;
                        }
                        return Ok(());
                    }
                }
            }
        }
        let name = &object.place.name;
        let why = format!("cannot read {name}: the store has sent less than it was asked for");
        Err(StoreError::new(StoreErrorKind::Unavailable, why))
    }

    /// Keeps a block: readers find it with the request until it is in the cache. A block that is
    /// read once need not come there.
    async fn land(&self, landed: Landed, keeping: &mut VecDeque<JoinHandle<()>>) {
        let landed = match &self.held {
            Some(held) => held.hold(landed),
            None => Some(landed),
        };
        let Some(landed) = landed else { return };
        if keeping.len() >= KEEPING_MAX
            && let Some(kept) = keeping.pop_front()
        {
            let _ = kept.await;
        }
        let this = self.clone();
        keeping.push_back(self.runtime.spawn(boxed(async move {
            this.keep(landed.key, landed.data.clone()).await;
            drop(landed);
        })));
    }

    pub(super) async fn keep(&self, key: Key, data: Bytes) {
        let _turn = self.writes.acquire().await;
        let cache = Arc::clone(&self.cache);
        // A slow local disk does not hold up requests.
        let kept = self.runtime.spawn_blocking(move || cache.put(key, &data));
        if kept.await.is_err() {
            tracing::debug!("a block was not kept");
        }
    }
}

impl fmt::Debug for ObjectCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectCache").field("is_on", &self.cache.is_on()).finish_non_exhaustive()
    }
}

/// One object, as it was when it was opened.
#[derive(Debug)]
pub(super) struct PinnedObject {
    pub(super) place: Place,
    /// What the store calls these contents.
    pub(super) etag: String,
    /// In bytes.
    pub(super) size: u64,
    /// A digest of these three.
    pub(super) id: [u8; 16],
}

impl PinnedObject {
    /// Requests a range, and checks that the reply is of this object.
    async fn get(&self, range: Range<u64>) -> Result<GetResult> {
        let options = GetOptions {
            if_match: Some(self.etag.clone()),
            range: Some(GetRange::Bounded(range.clone())),
            ..GetOptions::default()
        };
        let reply = self.place.store.get_opts(&self.place.path, options).await;
        let reply = reply.map_err(|error| self.failed(&error))?;
        // Servers may ignore the condition.
        if reply.meta.e_tag.as_deref() != Some(&*self.etag) || reply.meta.size != self.size {
            return Err(self.replaced());
        }
        if reply.range != range {
            let name = &self.place.name;
            let why = format!("cannot read {name}: the store sends another range than asked for");
            return Err(StoreError::new(StoreErrorKind::Unsuitable, why));
        }
        Ok(reply)
    }

    fn failed(&self, error: &object_store::Error) -> StoreError {
        StoreError::of("read", &self.place.name, error)
    }

    fn replaced(&self) -> StoreError {
        let error = object_store::Error::Precondition { path: String::new(), source: "".into() };
        self.failed(&error)
    }

    /// The number of blocks.
    pub(super) const fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK_LEN as u64)
    }

    /// The bytes of blocks.
    fn range(&self, blocks: &Range<u64>) -> Range<u64> {
        let end = blocks.end.saturating_mul(BLOCK_LEN as u64).min(self.size);
        blocks.start * BLOCK_LEN as u64..end
    }

    /// The length of a block, in bytes.
    pub(super) fn block_len(&self, block: u64) -> usize {
        let range = self.range(&(block..block + 1));
        usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(BLOCK_LEN)
    }
}
