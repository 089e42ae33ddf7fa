//! Reads a backup as a disk.

mod ahead;
mod cache;
mod difference;
mod fetch;
mod storage;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use bytes::Bytes;
use tokio::sync::Semaphore;

use self::ahead::Ahead;
use self::cache::{Cache, Found};
pub use self::difference::Difference;
use super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::head::Head;
use super::id::Id;
use super::map::Map;
use super::objects::Objects;
use super::page::BLOCK_SIZE;
use super::protocol::{Answer, Reader, Request, Rules, Step};
use super::repository::Repository;
use crate::runtime::boxed;

/// Blocks of one step of a read: no read needs more than the cache holds.
const STEP: u64 = 64;

/// Requests for the blocks of a disk at a time.
const REQUESTS: usize = 16;
/// Failures of requests that were made for other blocks as well, before a read is given up.
const FAILURES_MAX: u32 = 8;

/// Told of a damaged block: its offset on the disk, in bytes, and what is wrong.
pub type OnDamage = Arc<dyn Fn(u64, &RepositoryError) + Send + Sync>;

/// What becomes of blocks that cannot be read because the repository is damaged.
#[derive(Clone, Default)]
pub enum Damage {
    /// They are errors.
    #[default]
    Refused,
    /// They read as zero, and are told.
    Told(OnDamage),
}

impl std::fmt::Debug for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Refused => "Refused",
            Self::Told(_) => "Told",
        })
    }
}

/// A backup that is open for reading: a [`Storage`](imgfmt::Storage) that cannot be written to.
///
/// It is pinned: a gc keeps it, even if it is forgotten meanwhile. [`close`](Self::close) removes
/// the pin, and so does dropping it, by a call that blocks; if neither happens, the pin stays until
/// it is removed by its identity.
#[derive(Debug)]
pub struct OpenBackup {
    disk: Arc<Disk>,
    /// What the backup is of this disk.
    head: Head,
    /// Where the disk is in the backup, in bytes: it begins with a map page.
    window: Range<u64>,
    pin: Mutex<Option<Reader>>,
    repository: Repository,
}

/// What reads need.
#[derive(Debug)]
struct Disk {
    map: Map,
    /// Where the disk begins in the backup, in bytes.
    start: u64,
    /// Blocks of the backup up to the end of the disk: what is behind it is not read ahead.
    count: u64,
    objects: Arc<Objects>,
    cache: Mutex<Cache>,
    requests: Semaphore,
    damage: Damage,
}

impl Repository {
    /// Opens a backup of one disk for reading.
    ///
    /// # Errors
    ///
    /// If it was forgotten or is damaged, if it has several disks, and as for all requests to the
    /// store.
    pub async fn read(&self, id: Id, damage: Damage) -> Result<OpenBackup> {
        self.read_disk(id, None, damage).await
    }

    /// Opens a disk of a backup for reading: that of this name, if the backup has several.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read); if the backup has no such disk.
    pub async fn read_disk(
        &self,
        id: Id,
        name: Option<&str>,
        damage: Damage,
    ) -> Result<OpenBackup> {
        let mut reader = Reader::new(Id::random()?, id, Rules::ALL);
        let mut root = None;
        let opened = loop {
            match reader.step() {
                Step::Request(request) => {
                    let answer = self.ask(&reader, request, &mut root).await;
                    if answer.is_err() {
                        self.unpin(&mut reader).await;
                    }
                    reader.answer(answer?);
                }
                Step::Reached(Some(opened)) => break opened,
                Step::Reached(None) => {
                    return Err(RepositoryError::new(
                        RepositoryErrorKind::Fenced,
                        format!("the backup {id} was forgotten"),
                    ));
                }
            }
        };
        let map = opened.map.as_ref().map(|map| &*map.object);
        let opened = Map::of(self, id, &opened.backup.object, map);
        let opened = opened.and_then(|map| map.head().of_disk(name).map(|head| (map, head)));
        let (map, head) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                self.unpin(&mut reader).await;
                return Err(error);
            }
        };
        let objects = Arc::clone(&self.objects);
        let start = head.disks.first().map_or(0, |disk| disk.offset);
        let window = start..start.saturating_add(head.size);
        let count = window.end.min(map.size()).div_ceil(BLOCK_SIZE);
        let (cache, requests) = (Mutex::default(), Semaphore::new(REQUESTS));
        let disk = Arc::new(Disk { map, start, count, objects, cache, requests, damage });
        let pin = Mutex::new(Some(reader));
        Ok(OpenBackup { disk, head, window, pin, repository: self.clone() })
    }

    /// Carries a request of a reader out. The first time that its root may be read at the same
    /// time, it is, and kept until the reader asks for it.
    async fn ask(
        &self,
        reader: &Reader,
        request: Request,
        root: &mut Option<Result<Answer>>,
    ) -> Result<Answer> {
        if matches!(request, Request::Get(_))
            && let Some(found) = root.take()
        {
            return found;
        }
        match reader.beside().filter(|_| root.is_none()) {
            Some(beside) => {
                let carry_out = |request| self.objects.carry_out(request);
                let (one, other) = (carry_out(request), carry_out(beside));
                let (answer, found) = tokio::join!(one, other);
                *root = Some(found);
                answer
            }
            None => self.objects.carry_out(request).await,
        }
    }

    /// Removes a pin, as well as that goes: one that stays costs space.
    async fn unpin(&self, reader: &mut Reader) {
        reader.end();
        if let Step::Request(request) = reader.step() {
            let _ = self.objects.carry_out(request).await;
        }
    }
}

impl OpenBackup {
    /// The identity of the backup.
    pub fn id(&self) -> Id {
        self.disk.map.id()
    }

    /// What the backup is of this disk, as [`Head::of_disk`] says.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// The size of the disk, in bytes.
    pub fn size(&self) -> u64 {
        self.head.size
    }

    /// Ends the reading: removes the pin.
    pub async fn close(&self) {
        let reader = self.pin.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut reader) = reader {
            self.repository.unpin(&mut reader).await;
        }
    }

    /// Reads a part of the disk; zeroes are `None`. Returns whole blocks: those that have a byte of
    /// the range.
    ///
    /// # Errors
    ///
    /// If a block is damaged or missing, and as for all requests to the store.
    pub async fn blocks(&self, blocks: Range<u64>) -> Result<Vec<Option<Bytes>>> {
        let first = self.window.start / BLOCK_SIZE;
        self.disk.blocks(first + blocks.start..first + blocks.end).await
    }
}

impl Drop for OpenBackup {
    fn drop(&mut self) {
        // Nobody reads what would be read ahead.
        self.disk.cache().ahead = Ahead::default();
        let reader = self.pin.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let (Some(mut reader), Ok(runtime)) = (reader, crate::runtime()) else { return };
        let repository = self.repository.clone();
        let (sender, removed) = mpsc::channel();
        runtime.spawn(boxed(async move {
            repository.unpin(&mut reader).await;
            let _ = sender.send(());
        }));
        // A process that ends at once would leave the pin.
        let _ = removed.recv_timeout(std::time::Duration::from_secs(10));
    }
}

impl Disk {
    async fn blocks(self: &Arc<Self>, blocks: Range<u64>) -> Result<Vec<Option<Bytes>>> {
        let mut all = Vec::with_capacity((blocks.end - blocks.start) as usize);
        let mut at = blocks.start;
        while at < blocks.end {
            let end = (at + STEP).min(blocks.end);
            all.extend(self.step(at..end).await?);
            at = end;
        }
        Ok(all)
    }

    async fn step(self: &Arc<Self>, blocks: Range<u64>) -> Result<Vec<Option<Bytes>>> {
        let mut failures = 0;
        loop {
            let (found, is_due) = {
                let mut cache = self.cache();
                let is_due = cache.ahead.passes(&blocks);
                (cache.find(blocks.clone(), self.count), is_due)
            };
            self.read_ahead_if(is_due);
            let (ended, is_own) = match found {
                Found::All(found) => return Ok(found),
                Found::Fetching(arrival) => (arrival.wait().await, false),
                Found::Missing(missing, fetch, arrival) => {
                    let disk = Arc::clone(self);
                    let wanted = blocks.end;
                    let task = async move { disk.fetch(missing, wanted, &fetch).await };
                    // Not this task's own: others wait for the same blocks.
                    tokio::spawn(boxed(task));
                    (arrival.wait().await, true)
                }
            };
            let Err(error) = ended else { continue };
            failures += 1;
            // What was read ahead, or for others, may be at fault.
            if (is_own && failures > 1) || failures > FAILURES_MAX {
                return self.cache().kept(blocks).ok_or(error);
            }
        }
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns blocks that are in memory.
    fn kept(self: &Arc<Self>, blocks: Range<u64>) -> Option<Vec<Option<Bytes>>> {
        let (found, is_due) = {
            let mut cache = self.cache();
            (cache.kept(blocks.clone()), cache.ahead.passes(&blocks))
        };
        self.read_ahead_if(is_due);
        found
    }

    /// Begins to read ahead, on threads that outlive the caller's.
    fn read_ahead_if(self: &Arc<Self>, is_due: bool) {
        if is_due {
            match crate::runtime() {
                Ok(runtime) => drop(runtime.spawn(boxed(Arc::clone(self).read_ahead()))),
                Err(_) => self.cache().ahead.stop(),
            }
        }
    }
}
