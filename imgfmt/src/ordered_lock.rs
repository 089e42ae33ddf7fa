//! Locks that know in which order they are taken.
//!
//! Two threads that take the same two locks in different orders wait for each other forever, and a
//! thread that takes a lock again which it holds waits for itself. So the locks of this crate have
//! [ranks](rank) in their types, and a thread takes only locks of higher ranks than those that it
//! holds. Builds with debug assertions, and so all tests, check that, whether anybody has to wait or
//! not: a lock that is taken out of order panics. Other builds do not know the ranks at run time.
//! `cargo xtask tidy` refuses locks without a rank, except those of storages for tests.
//!
//! None of the locks of an image is held while data is moved, except the stripes.

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
        /// What the threads of a job have still to do. Held while the extents of images are looked up.
        AGENDA,
        /// What a job has found.
        JOB_RESULT,
        /// The progress of a job. Held while the observer is told.
        PROGRESS,
        /// When a job may move more.
        RATE_LIMIT,
        /// The bitmaps: shared while the disk changes, exclusive while the list of them does.
        BITMAPS,
        /// The number of changes that no thread carries out. An exclusive holder of the bitmaps waits for
        /// their end with it, before the bitmaps are locked.
        ELSEWHERE,
        /// The first change since bitmaps were stored is being announced to the image.
        MARKING,
        /// The turn to flush.
        FLUSH,
        /// One per guest cluster (several clusters share one), taken by ascending numbers. A change of
        /// the mapping of a cluster holds its stripe from the lookup to the commit. Writes in place need
        /// none.
        STRIPE,
        /// An L2 table is made or moved.
        L1_CHANGE,
        /// Shared while a mapping is changed in memory, exclusive while a flush takes its copy of
        /// everything. So a copy holds each mapping with the refcounts it needs.
        GATE,
        /// Where bitmaps are in the file. Also taken to count all references, for an allocation.
        DIRECTORY,
        SESSION,
        OWNERSHIP,
        QUARANTINE,
        /// A part of the cache of L2 tables.
        TABLE_CACHE,
        /// Whether an L2 table that one thread reads from the file is there. Waited for by others that need
        /// it, not held while it is read.
        TABLE_LOAD,
        /// The L2 tables that a thread has used lately.
        RECENT_TABLES,
        /// An L2 table is changed, or looked at as a whole.
        TABLE,
        /// A refcount block is read from the file.
        BLOCK_LOAD,
        L2_PLACES,
        ALLOCATOR,
        DIRTY_L1,
        FREED,
        DECOMPRESSED,
        LINEAGE,
        /// Header extensions or autoclear bits change.
        HEADER_EDIT,
        LEASES,
        HEADER,
        HEADER_WRITES,
        SIDECAR,
        /// The waiters for each commit of the sidecar's log. Not held while one is made.
        LOG_QUEUE,
        /// What the slots of the sidecar's log hold. Held while they are written.
        LOG_SLOTS,
        /// The first sector of a raw image that was found by probing is checked and changed.
        FIRST_SECTOR,
        /// The first sector of an unfinished disk. Held while its mark is written.
        UNFINISHED,
        /// The list of ranges of a file that are written past the page cache. The ranges have no rank: a
        /// thread may hold several, and give them to another.
        FILE_RANGES,
        /// The pages of a storage in memory.
        MEMORY_STORAGE,
        /// Buffers for transfers past the page cache that are not in use.
        BOUNCE_BUFFERS,
    }
}

/// A mutex with a rank. What it holds is whole even if a thread panicked while it held it.
#[derive(Debug, Default)]
pub(crate) struct OrderedMutex<const RANK: u8, T>(Mutex<T>);

/// A read-write lock with a rank; for the order it makes no difference how it is taken. What it holds
/// is whole even if a thread panicked while it held it.
#[derive(Debug, Default)]
pub(crate) struct OrderedRwLock<const RANK: u8, T>(RwLock<T>);

/// The lock is held as long as this lives.
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

    /// As [`lock`](Self::lock), if it is free. That never waits, so any order will do.
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
    /// Lets go of the lock until `condition` is notified. It counts as held meanwhile: the thread
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

/// What each thread holds, in builds that check it.
#[cfg(debug_assertions)]
mod held {
    use std::cell::RefCell;

    use super::rank::{NAMES, STRIPE};

    thread_local! {
        static RANKS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }

    /// Notes a lock of this thread as held until it is dropped.
    #[derive(Debug)]
    pub(super) struct Held(u8);

    impl Held {
        /// Before a lock is taken that may have to be waited for.
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
            // A thread that ends has nothing that could be checked.
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

/// Nothing is noted in other builds.
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
