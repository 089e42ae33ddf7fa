//! One value per thread, so that threads that only read do not contend.

use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::available_parallelism;

/// The maximum number of values of one kind, on machines with many cores.
const VALUES_MAX: usize = 64;

/// One value for each thread that is likely to run at the same time. If there are more threads,
/// several share a value, so it must be a lock or atomic.
#[derive(Debug)]
pub(crate) struct PerThread<T>(Box<[Padded<T>]>);

/// A value that shares no cache line with another; processors fetch lines in pairs.
#[derive(Debug)]
#[repr(align(128))]
struct Padded<T>(T);

impl<T> PerThread<T> {
    pub(crate) fn new(mut make: impl FnMut() -> T) -> Self {
        Self((0..count()).map(|_| Padded(make())).collect())
    }

    /// The value of this thread.
    #[inline]
    pub(crate) fn mine(&self) -> &T {
        // The count is a power of two.
        &self.0[number_of_thread() & (self.0.len() - 1)].0
    }

    /// The values of all threads.
    pub(crate) fn all(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|padded| &padded.0)
    }
}

/// Twice the number of cores: for the threads of a pool, and those that serve connections.
fn count() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(|| {
        let cores = available_parallelism().map_or(1, usize::from);
        (2 * cores).next_power_of_two().min(VALUES_MAX)
    })
}

fn number_of_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    thread_local! {
        static NUMBER: Cell<usize> = const { Cell::new(0) };
    }
    // A thread that is ending has lost its number; it may share one.
    let number = NUMBER.try_with(|number| {
        if number.get() == 0 {
            number.set(NEXT.fetch_add(1, Relaxed));
        }
        number.get()
    });
    number.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_finds_its_value_again_and_its_neighbour_another() {
        let values = PerThread::new(|| AtomicUsize::new(0));
        values.mine().fetch_add(1, Relaxed);
        let mine = std::ptr::from_ref(values.mine()) as usize;
        // Numbers are given in turn: of two new threads at most one shares a value with this one.
        let others: Vec<usize> = (0..2)
            .map(|_| {
                std::thread::scope(|scope| {
                    let other = scope.spawn(|| std::ptr::from_ref(values.mine()) as usize);
                    other.join().unwrap()
                })
            })
            .collect();
        assert!(others.iter().any(|other| *other != mine));
        assert_eq!(values.mine().load(Relaxed), 1);
        assert_eq!(values.all().map(|value| value.load(Relaxed)).sum::<usize>(), 1);
    }
}
