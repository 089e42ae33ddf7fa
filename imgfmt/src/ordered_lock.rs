//! Locks that know in which order they are taken.
//!
//! Two threads that take the same two locks in different orders wait for each other forever, and a
//! thread that takes a lock again which it holds waits for itself. Therefore the locks of this
//! crate have [ranks](rank) in their types, and a thread takes only locks of higher ranks than
//! those that it holds. Builds with debug assertions, and so all tests, check this even if no
//! thread has to wait: a lock that is taken out of order panics. Other builds do not know the ranks
//! at run time. `cargo xtask tidy` refuses locks without a rank, except those of storages for
//! tests.
//!
//! None of the locks of an image is held while data is transferred, except the stripes.

use std::ops::{Deref, DerefMut};
use std::sync::{
    Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
    TryLockError,
};

/// Defines the ranks in ascending order, and their names for messages.
macro_rules! ranks {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        #[expect(non_camel_case_types, clippy::upper_case_acronyms, reason = "names of constants")]
        enum Rank { $($name),* }

        $($(#[$doc])* pub(crate) const $name: u8 = Rank::$name as u8;)*

        #[cfg(debug_assertions)]
        pub(super) const NAMES: &[&str] = &[$(stringify!($name)),*];
    };
}

/// The ranks of all locks, from the first that is taken to the last: of jobs, of an image, of its
/// storages.
pub(crate) mod rank {
    ranks! {
        /// The remaining work of a job's threads. Held while the extents of images are looked up.
        AGENDA,
        /// Whose turn it is to write, of the threads of a job.
        TURN,
        /// The results of a job.
        JOB_RESULT,
        /// The progress of a job. Held while the observer is called.
        PROGRESS,
        /// When a job may transfer more.
        RATE_LIMIT,
        /// Held while layers below an image are taken away.
        DETACHING,
        /// The list of the layers of an image.
        LAYERS,
        /// The bitmaps: shared while the disk changes, exclusive while the list of them does.
        BITMAPS,
        /// The number of changes that the kernel carries out without a thread. Before the bitmaps
        /// are locked exclusively, their end is waited for.
        ELSEWHERE,
        /// Held while bitmaps are marked as in use, for the first change since they were stored.
        MARKING,
        /// Held by the thread that flushes.
        FLUSH,
        /// One per guest cluster (several clusters share one), taken by ascending numbers. A change
        /// of the mapping of a cluster holds its stripe from the lookup to the commit. Writes in
        /// place need none.
        STRIPE,
        /// Held while an L2 table is created or moved.
        L1_CHANGE,
        /// Shared while a mapping is changed in memory, exclusive while a flush copies all changes.
        /// So the copy contains each mapping with its refcounts.
        GATE,
        /// The places of bitmaps in the file. Also taken to count all references, for an
        /// allocation.
        DIRECTORY,
        SESSION,
        OWNERSHIP,
        QUARANTINE,
        /// A part of the cache of L2 tables.
        TABLE_CACHE,
        /// Whether an L2 table that one thread reads from the file is loaded. Other threads that
        /// need the table wait for it; it is not held during the read.
        TABLE_LOAD,
        /// The L2 tables that a thread has used lately.
        RECENT_TABLES,
        /// One L2 table, while it is changed or read completely.
        TABLE,
        /// Held while a refcount block is read from the file.
        BLOCK_LOAD,
        L2_PLACES,
        ALLOCATOR,
        DIRTY_L1,
        FREED,
        DECOMPRESSED,
        LINEAGE,
        /// Held while header extensions or autoclear bits are changed.
        HEADER_EDIT,
        LEASES,
        /// The layer below an image, as one thread sees it.
        BACKING,
        HEADER,
        HEADER_WRITES,
        SIDECAR,
        /// The waiters for each commit of the sidecar's log. Not held while one is made.
        LOG_QUEUE,
        /// The contents of the slots of the sidecar's log. Held while they are written.
        LOG_SLOTS,
        /// The table of blocks of a new image. Held while a page of it is read or written, and a
        /// block is added, which may be read from the image below.
        NEW_IMAGE,
        /// Held while a page of the tables of an image that is only read is looked for or replaced,
        /// and not while it is read.
        FOREIGN_PAGE,
        /// Held while decompressed blocks of an image that is only read are looked for or kept.
        FOREIGN_DECODED,
        /// Held while the first sector of a raw image that was found by probing is checked and
        /// changed.
        FIRST_SECTOR,
        /// The first sector of an unfinished disk. Held while its mark is written.
        UNFINISHED,
        /// The list of ranges of a file that are written past the page cache. The ranges have no
        /// rank: a thread may hold several, and give them to another.
        FILE_RANGES,
        /// The pages of a storage in memory.
        MEMORY_STORAGE,
        /// Buffers for transfers past the page cache, or for ciphertext, that are not in use.
        BOUNCE_BUFFERS,
        /// States of ciphers that are not in use.
        #[cfg_attr(not(feature = "encryption"), expect(dead_code, reason = "there are no ciphers"))]
        CIPHER_CONTEXTS,
        /// Held while a key is derived by a function that needs much memory.
        #[cfg_attr(not(feature = "encryption"), expect(dead_code, reason = "there are no keys"))]
        KEY_DERIVATION,
        /// What was written of a file that is written once.
        WRITTEN_PARTS,
        /// The error of data that could not be written back. Held while the system is asked.
        LOST_PARTS,
        /// The files that this process writes to. Held while one is opened or closed for writing.
        WRITTEN_FILES,
    }
}

/// A mutex with a rank. Its value is consistent even if a thread panicked while it held the lock.
#[derive(Debug, Default)]
pub(crate) struct OrderedMutex<const RANK: u8, T>(Mutex<T>);

/// A read-write lock with a rank; for the order, shared and exclusive locks are the same. Its value
/// is consistent even if a thread panicked while it held the lock.
#[derive(Debug, Default)]
pub(crate) struct OrderedRwLock<const RANK: u8, T>(RwLock<T>);

/// A lock that is held while this lives.
#[derive(Debug)]
pub(crate) struct Ordered<G> {
    guard: G,
    _held: held::Held,
}

impl<const RANK: u8, T> OrderedMutex<RANK, T> {
    pub(crate) const fn new(content: T) -> Self {
        Self(Mutex::new(content))
    }

    #[inline]
    pub(crate) fn lock(&self) -> Ordered<MutexGuard<'_, T>> {
        let held = held::Held::in_order(RANK);
        Ordered { guard: self.0.lock().unwrap_or_else(PoisonError::into_inner), _held: held }
    }

    /// As [`lock`](Self::lock), if the lock is free. This never waits, so the order does not
    /// matter.
    #[inline]
    pub(crate) fn try_lock(&self) -> Option<Ordered<MutexGuard<'_, T>>> {
        let guard = match self.0.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Ordered { guard, _held: held::Held::in_any_order(RANK) })
    }
}

impl<const RANK: u8, T> OrderedRwLock<RANK, T> {
    pub(crate) const fn new(content: T) -> Self {
        Self(RwLock::new(content))
    }

    #[inline]
    pub(crate) fn read(&self) -> Ordered<RwLockReadGuard<'_, T>> {
        let held = held::Held::in_order(RANK);
        Ordered { guard: self.0.read().unwrap_or_else(PoisonError::into_inner), _held: held }
    }

    /// As [`read`](Self::read), if that needs no waiting.
    #[inline]
    pub(crate) fn try_read(&self) -> Option<Ordered<RwLockReadGuard<'_, T>>> {
        let guard = match self.0.try_read() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Ordered { guard, _held: held::Held::in_any_order(RANK) })
    }

    /// As [`write`](Self::write), if that needs no waiting.
    pub(crate) fn try_write(&self) -> Option<Ordered<RwLockWriteGuard<'_, T>>> {
        let guard = match self.0.try_write() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Ordered { guard, _held: held::Held::in_any_order(RANK) })
    }

    #[inline]
    pub(crate) fn write(&self) -> Ordered<RwLockWriteGuard<'_, T>> {
        let held = held::Held::in_order(RANK);
        Ordered { guard: self.0.write().unwrap_or_else(PoisonError::into_inner), _held: held }
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Ordered<MutexGuard<'_, T>> {
    /// Releases the lock until `condition` is notified. It counts as held meanwhile: the thread
    /// takes it again before it does anything else.
    pub(crate) fn wait(self, condition: &Condvar) -> Self {
        let guard = condition.wait(self.guard).unwrap_or_else(PoisonError::into_inner);
        Self { guard, _held: self._held }
    }
}

impl<G: Deref> Deref for Ordered<G> {
    type Target = G::Target;

    #[inline]
    fn deref(&self) -> &G::Target {
        &self.guard
    }
}

impl<G: DerefMut> DerefMut for Ordered<G> {
    #[inline]
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.guard
    }
}

/// The locks that each thread holds, in builds that check them.
#[cfg(debug_assertions)]
mod held {
    use std::cell::RefCell;

    use super::rank::{NAMES, STRIPE};

    thread_local! {
        static RANKS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }

    /// Records a lock of this thread as held until this is dropped.
    #[derive(Debug)]
    pub(super) struct Held(u8);

    impl Held {
        /// Called before taking a lock that the thread may have to wait for.
        pub(super) fn in_order(rank: u8) -> Self {
            let highest = RANKS.try_with(|ranks| ranks.borrow().iter().max().copied());
            if let Some(highest) = highest.ok().flatten() {
                let is_in_order = highest < rank || (highest, rank) == (STRIPE, STRIPE);
                // A second panic would end the process and hide the first.
                assert!(
                    is_in_order || std::thread::panicking(),
                    "the lock {} is taken while {} is held",
                    NAMES[usize::from(rank)],
                    NAMES[usize::from(highest)]
                );
            }
            Self::in_any_order(rank)
        }

        pub(super) fn in_any_order(rank: u8) -> Self {
            // In a thread that ends, nothing can be checked.
            let _ = RANKS.try_with(|ranks| ranks.borrow_mut().push(rank));
            Self(rank)
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            let _ = RANKS.try_with(|ranks| {
                let mut ranks = ranks.borrow_mut();
                if let Some(last) = ranks.iter().rposition(|rank| *rank == self.0) {
                    ranks.remove(last);
                }
            });
        }
    }
}

/// Nothing is recorded in other builds.
#[cfg(not(debug_assertions))]
mod held {
    #[derive(Debug)]
    pub(super) struct Held;

    impl Held {
        #[inline]
        pub(super) fn in_order(_: u8) -> Self {
            Self
        }

        #[inline]
        pub(super) fn in_any_order(_: u8) -> Self {
            Self
        }
    }
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[derive(Default)]
    struct Locks {
        bitmaps: OrderedRwLock<{ rank::BITMAPS }, ()>,
        stripes: [OrderedMutex<{ rank::STRIPE }, ()>; 2],
        allocator: OrderedMutex<{ rank::ALLOCATOR }, u32>,
    }

    fn panics<T>(take: impl FnOnce() -> T) -> bool {
        catch_unwind(AssertUnwindSafe(|| drop(take()))).is_err()
    }

    #[test]
    fn a_lock_of_a_lower_rank_is_not_taken_while_a_higher_one_is_held() {
        let locks = Locks::default();
        let allocator = locks.allocator.lock();
        assert!(panics(|| locks.stripes[0].lock()) && panics(|| locks.bitmaps.read()));
        drop(allocator);
        let _in_order = (locks.bitmaps.read(), locks.stripes[0].lock(), locks.stripes[1].lock());
        *locks.allocator.lock() += 1;
        assert_eq!(*locks.allocator.lock(), 1);
    }

    #[test]
    fn a_lock_is_not_taken_again_while_it_is_held_even_for_reading() {
        let locks = Locks::default();
        let held = locks.bitmaps.read();
        assert!(panics(|| locks.bitmaps.read()) && panics(|| locks.bitmaps.write()));
        drop(held);
        assert!(!panics(|| locks.bitmaps.write()));
    }

    #[test]
    fn a_lock_that_is_not_waited_for_counts_as_held_but_may_be_taken_in_any_order() {
        let locks = Locks::default();
        let allocator = locks.allocator.lock();
        let stripe = locks.stripes[0].try_lock();
        assert!(stripe.is_some() && locks.bitmaps.try_read().is_some());
        drop(allocator);
        assert!(panics(|| locks.bitmaps.read()));
        drop(stripe);
        assert!(!panics(|| locks.bitmaps.read()));
    }

    #[test]
    fn a_lock_counts_as_held_while_it_is_waited_with() {
        let locks = Locks::default();
        let (allocator, changed) = (&locks.allocator, Condvar::new());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let mut count = allocator.lock();
                while *count == 0 {
                    count = count.wait(&changed);
                }
                panics(|| locks.bitmaps.read())
            });
            *allocator.lock() += 1;
            changed.notify_all();
            assert!(waiting.join().unwrap());
        });
        assert!(!panics(|| locks.bitmaps.read()));
    }

    #[test]
    fn each_thread_has_its_own_order() {
        let locks = Locks::default();
        let _allocator = locks.allocator.lock();
        let other =
            std::thread::scope(|scope| scope.spawn(|| panics(|| locks.bitmaps.read())).join());
        assert!(!other.unwrap());
    }
}
