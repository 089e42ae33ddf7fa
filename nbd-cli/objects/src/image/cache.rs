//! Which blocks are in the cache, and which gives way.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Result, StoreError, StoreErrorKind};
use crate::shown::shown;

use super::cache_file::{BLOCK_LEN, CacheFile, Entry, Key};

/// Smallest cache, in bytes: the longest read-ahead, several times.
pub const CACHE_SIZE_MIN: u64 = 64 << 20;

/// Largest cache, in bytes: the index of a larger one would take too much memory.
const CACHE_SIZE_MAX: u64 = 1 << 40;

/// Largest cache without a name, in bytes: every process can have one.
const UNNAMED_MAX: u64 = 256 << 20;

/// How often a process reads the blocks of objects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reads {
    /// Again and again: all blocks are kept on the local disk.
    #[default]
    Again,
    /// Once, in order: blocks are kept in memory until they have been read, and on the local disk
    /// only if that is long.
    Once,
}

/// The place and size of a cache.
#[derive(Clone, Debug)]
pub struct CacheSettings {
    /// The directory; it is made if it does not exist. By default the cache is in the directory for
    /// temporary files, and ends with the process.
    pub directory: Option<PathBuf>,
    /// Whether the process goes on with a temporary cache, or none, if the directory cannot be
    /// used.
    pub is_optional: bool,
    /// How often blocks are read.
    pub reads: Reads,
    /// Limit of its data, in bytes. A cache that ends with its process has at most 256 MiB.
    pub size: u64,
}

impl Default for CacheSettings {
    fn default() -> Self {
        Self { directory: None, is_optional: true, reads: Reads::Again, size: 4 << 30 }
    }
}

/// Blocks on the local disk. No failure of the disk is an error here: it costs a block.
#[derive(Debug)]
pub(super) struct Cache {
    file: Option<CacheFile>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    slots: Vec<Slot>,
    map: HashMap<Key, usize>,
    /// Most slots.
    capacity: usize,
    /// Where the search for a slot goes on (the algorithm CLOCK).
    hand: usize,
}

#[derive(Debug, Default)]
struct Slot {
    entry: Option<Entry>,
    /// Whether the sum of its data has been compared.
    is_checked: bool,
    /// Whether it was used since the hand went past it.
    is_used: bool,
    /// Calls that read or write it now: it must not be overwritten.
    users: u32,
}

impl Cache {
    /// Opens the cache.
    ///
    /// # Errors
    ///
    /// The directory cannot be used, and is not optional.
    pub(super) fn open(settings: &CacheSettings) -> Result<Self> {
        let size = settings.size.clamp(CACHE_SIZE_MIN, CACHE_SIZE_MAX);
        let capacity = usize::try_from(size / BLOCK_LEN as u64).unwrap_or(usize::MAX);
        let temporary = || CacheFile::unnamed(&std::env::temp_dir()).map(|file| (file, Vec::new()));
        let opened = match &settings.directory {
            Some(directory) => match CacheFile::open(directory, capacity) {
                Err(error) if !settings.is_optional => {
                    let why = shown(&error.to_string());
                    let why = format!("cannot use the cache in '{}': {why}", directory.display());
                    return Err(StoreError::new(StoreErrorKind::Local, why));
                }
                Err(_) => temporary(),
                opened => opened,
            },
            None => temporary(),
        };
        let Ok((file, entries)) = opened else {
            return Ok(Self { file: None, state: Mutex::default() });
        };
        let unnamed_max = usize::try_from(UNNAMED_MAX / BLOCK_LEN as u64).unwrap_or(usize::MAX);
        let capacity = if file.is_named() { capacity } else { capacity.min(unnamed_max) };
        let mut state = State { capacity, ..State::default() };
        for (index, entry) in entries.into_iter().enumerate() {
            if let Some(entry) = entry {
                state.map.insert(entry.key, index);
            }
            state.slots.push(Slot { entry, ..Slot::default() });
        }
        Ok(Self { file: Some(file), state: Mutex::new(state) })
    }

    /// Whether blocks can be kept.
    pub(super) fn is_on(&self) -> bool {
        self.capacity() > 0
    }

    /// Returns how many blocks can be kept.
    pub(super) fn capacity(&self) -> u64 {
        self.file.as_ref().map_or(0, |_| self.state().capacity as u64)
    }

    pub(super) fn contains(&self, key: Key) -> bool {
        self.state().map.contains_key(&key)
    }

    /// Reads a part of a block; returns whether it was there.
    pub(super) fn read(&self, key: Key, offset: usize, buffer: &mut [u8]) -> bool {
        let Some((file, user)) = self.begin(key) else { return false };
        let is_read = match user.is_checked {
            true => file.read(user.slot, offset, buffer).is_ok(),
            false => read_and_check(file, &user, offset, buffer).unwrap_or(false),
        };
        let mut state = self.state();
        match is_read {
            true => state.slots[user.slot].is_checked = true,
            // Damaged, or a disk that fails: the store has it.
            false => state.remove(user.slot),
        }
        state.slots[user.slot].users -= 1;
        is_read
    }

    /// Reads a part of a block if nothing has to be waited for; returns whether that was so.
    pub(super) fn try_read(&self, key: Key, offset: usize, buffer: &mut [u8]) -> bool {
        let Some((file, user)) = self.begin(key) else { return false };
        let is_inside = offset + buffer.len() <= user.entry.length as usize;
        let is_read = user.is_checked && is_inside && file.try_read(user.slot, offset, buffer);
        self.state().slots[user.slot].users -= 1;
        is_read
    }

    /// Finds a block, and keeps its slot until the caller takes its use back.
    fn begin(&self, key: Key) -> Option<(&CacheFile, User)> {
        let file = self.file.as_ref()?;
        let mut state = self.state();
        let slot = *state.map.get(&key)?;
        let found = state.slots.get_mut(slot)?;
        let entry = found.entry?;
        found.users += 1;
        found.is_used = true;
        Some((file, User { slot, entry, is_checked: found.is_checked }))
    }

    /// Keeps a block.
    pub(super) fn put(&self, key: Key, data: &[u8]) {
        let Some(file) = &self.file else { return };
        let Ok(length) = u32::try_from(data.len()) else { return };
        let Some(slot) = self.state().reserve(key) else { return };
        let entry = Entry { key, length, sum: crc32fast::hash(data) };
        let written = file.write(slot, entry, data);
        let mut state = self.state();
        state.slots[slot].users -= 1;
        match written {
            // Another reader was faster if the key is there.
            Ok(()) if !state.map.contains_key(&key) => {
                state.map.insert(key, slot);
                state.slots[slot] =
                    Slot { entry: Some(entry), is_checked: true, is_used: true, users: 0 };
            }
            Ok(()) => {}
            Err(error) => state.shrink(slot, &error),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The use of a slot.
struct User {
    slot: usize,
    entry: Entry,
    is_checked: bool,
}

fn read_and_check(
    file: &CacheFile,
    user: &User,
    offset: usize,
    buffer: &mut [u8],
) -> io::Result<bool> {
    let mut data = vec![0; user.entry.length as usize];
    file.read(user.slot, 0, &mut data)?;
    let part = data.get(offset..).and_then(|data| data.get(..buffer.len()));
    let part = part.filter(|_| crc32fast::hash(&data) == user.entry.sum);
    if let Some(part) = part {
        buffer.copy_from_slice(part);
    }
    Ok(part.is_some())
}

impl State {
    /// Returns a slot that is not in use, for its new data.
    fn reserve(&mut self, key: Key) -> Option<usize> {
        if self.map.contains_key(&key) {
            return None;
        }
        let slot = if self.slots.len() < self.capacity {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        } else {
            self.evict()?
        };
        self.slots[slot].users += 1;
        Some(slot)
    }

    /// Frees the slot that was not used for longest, roughly. Finds none if all are in use.
    fn evict(&mut self) -> Option<usize> {
        for _ in 0..self.slots.len() * 2 {
            let slot = self.hand % self.slots.len();
            self.hand = slot + 1;
            let found = &mut self.slots[slot];
            if found.users == 0 && !std::mem::take(&mut found.is_used) {
                self.remove(slot);
                return Some(slot);
            }
        }
        None
    }

    fn remove(&mut self, slot: usize) {
        if let Some(entry) = self.slots[slot].entry.take()
            && self.map.get(&entry.key) == Some(&slot)
        {
            self.map.remove(&entry.key);
        }
    }

    /// Does without room that the disk does not have.
    fn shrink(&mut self, slot: usize, error: &io::Error) {
        let is_full = matches!(
            error.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
        );
        if is_full && slot + 1 == self.slots.len() && self.slots[slot].users == 0 {
            self.slots.pop();
            self.capacity = self.slots.len();
        }
        tracing::debug!(%error, blocks = self.capacity, "a block cannot be kept in the cache");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(block: u64) -> Key {
        Key { object: [1; 16], block }
    }

    fn cache(directory: &std::path::Path, blocks: usize) -> Cache {
        let settings = CacheSettings {
            directory: Some(directory.to_owned()),
            is_optional: false,
            size: CACHE_SIZE_MIN,
            ..CacheSettings::default()
        };
        let cache = Cache::open(&settings).unwrap();
        cache.state().capacity = blocks;
        cache
    }

    fn read(cache: &Cache, block: u64) -> Option<[u8; 3]> {
        let mut buffer = [0; 3];
        cache.read(key(block), 1, &mut buffer).then_some(buffer)
    }

    #[test]
    fn caches_that_end_with_their_processes_are_small() {
        let directory = tempfile::tempdir().unwrap();
        let size = 1 << 30;
        let of = |directory: Option<&std::path::Path>| {
            let directory = directory.map(std::path::Path::to_owned);
            Cache::open(&CacheSettings { directory, size, ..CacheSettings::default() }).unwrap()
        };
        let blocks = |bytes: u64| (bytes / BLOCK_LEN as u64) as usize;
        let first = of(Some(directory.path()));
        assert_eq!(first.state().capacity, blocks(size));
        // Another one uses the directory, or there is none.
        assert_eq!(of(Some(directory.path())).state().capacity, blocks(256 << 20));
        assert_eq!(of(None).state().capacity, blocks(256 << 20));
    }

    #[test]
    fn blocks_survive_the_process_and_damaged_ones_are_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let first = cache(directory.path(), 9);
        first.put(key(0), b"0123");
        first.put(key(1), b"4567");
        assert_eq!(read(&first, 0), Some(*b"123"));
        drop(first);
        use std::os::unix::fs::FileExt as _;
        let blocks = std::fs::File::options().write(true).open(directory.path().join("blocks"));
        blocks.unwrap().write_all_at(b"x", 0).unwrap();
        let second = cache(directory.path(), 9);
        let mut buffer = [0; 3];
        assert!(!second.try_read(key(1), 1, &mut buffer), "its sum was not compared yet");
        assert_eq!(read(&second, 0), None, "its data is not what the index says");
        assert!(!second.contains(key(0)));
        assert_eq!(read(&second, 1), Some(*b"567"));
        assert!(second.try_read(key(1), 1, &mut buffer));
    }

    #[test]
    fn what_was_not_used_gives_way() {
        let directory = tempfile::tempdir().unwrap();
        let cache = cache(directory.path(), 3);
        for block in 0..3 {
            cache.put(key(block), b"abcd");
        }
        cache.put(key(3), b"abcd"); // All were just used: the hand takes the first.
        assert!(!cache.contains(key(0)));
        assert!(read(&cache, 1).is_some());
        cache.put(key(4), b"abcd");
        assert!(cache.contains(key(1)) && !cache.contains(key(2)));
        assert_eq!(cache.state().slots.len(), 3);
    }

    #[test]
    fn slot_that_is_read_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let cache = cache(directory.path(), 1);
        cache.put(key(0), b"abcd");
        let (_, user) = cache.begin(key(0)).unwrap();
        cache.put(key(1), b"wxyz");
        assert!(!cache.contains(key(1)) && cache.contains(key(0)));
        cache.state().slots[user.slot].users -= 1;
        cache.put(key(1), b"wxyz");
        assert_eq!(read(&cache, 1), Some(*b"xyz"));
    }

    #[test]
    fn full_disk_makes_the_cache_smaller() {
        let directory = tempfile::tempdir().unwrap();
        let cache = cache(directory.path(), 9);
        cache.put(key(0), b"abcd");
        let mut state = cache.state();
        let slot = state.reserve(key(1)).unwrap();
        state.slots[slot].users -= 1;
        state.shrink(slot, &io::ErrorKind::StorageFull.into());
        assert_eq!((state.capacity, state.slots.len()), (1, 1));
        drop(state);
        cache.put(key(2), b"abcd");
        assert!(cache.contains(key(2)), "the room that there is, is used");
    }
}
