//! The tasks of one thread of a copy, which begin as they are needed.
//!
//! Each task has a piece of the disk in memory. For a server on the same machine a few tasks are
//! enough, and what they have then stays in the cache of the core. A server that is far away, or
//! has a slow disk, needs many requests in flight.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nbd_client::ReadMemory;
use tokio::sync::Semaphore;

/// Tasks that begin at once.
const FIRST_TASKS: u32 = 8;

/// If pieces take longer than this, twice as many tasks are needed. For the first tasks of two
/// threads and pieces of 256 KiB that is the case below 512 MiB/s.
const LONG: Duration = Duration::from_millis(8);

/// What the tasks of one thread share.
pub(super) struct Crew {
    /// Memory of earlier pieces.
    pub(super) memory: ReadMemory,
    /// Tasks that there are, begun or not.
    tasks: usize,
    more: Semaphore,
    pace: Mutex<Pace>,
}

/// What is known since the last tasks began.
struct Pace {
    /// Tasks that have begun.
    begun: u32,
    /// Pieces that were copied, and the time that they took together.
    pieces: u32,
    time: Duration,
}

impl Crew {
    /// Of at most `tasks` tasks.
    pub(super) fn new(tasks: usize) -> Self {
        let pace = Pace { begun: FIRST_TASKS, pieces: 0, time: Duration::ZERO };
        let (memory, more) = (ReadMemory::new(tasks), Semaphore::new(0));
        Self { memory, tasks, more, pace: Mutex::new(pace) }
    }

    /// Waits until the task of that number (of this thread) is needed; returns whether there is
    /// anything left to copy.
    pub(super) async fn join(&self, number: usize) -> bool {
        if number < FIRST_TASKS as usize {
            return true;
        }
        // An error: it was closed.
        self.more.acquire().await.map(tokio::sync::SemaphorePermit::forget).is_ok()
    }

    /// Takes note of a piece. Lets more tasks begin if each of the present ones has copied one,
    /// and they took long on average.
    pub(super) fn copied_in(&self, time: Duration) {
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        pace.pieces += 1;
        pace.time += time;
        if pace.pieces < pace.begun {
            return;
        }
        if pace.time > LONG * pace.pieces && (pace.begun as usize) < self.tasks {
            self.more.add_permits(pace.begun as usize);
            pace.begun *= 2;
        }
        (pace.pieces, pace.time) = (0, Duration::ZERO);
    }

    /// Ends the tasks that have not begun.
    pub(super) fn end(&self) {
        self.more.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn twice_as_many_tasks_begin_when_pieces_take_long_on_average() {
        let crew = Crew::new(64);
        for number in 0..FIRST_TASKS {
            assert!(crew.join(number as usize).await);
        }
        let mut further: Vec<_> = (FIRST_TASKS..=2 * FIRST_TASKS)
            .map(|number| Box::pin(crew.join(number as usize)))
            .collect();
        let copied = |times: u32, time| (0..times).for_each(|_| crew.copied_in(time));
        copied(1, LONG + FIRST_TASKS * LONG / 2);
        copied(FIRST_TASKS - 1, LONG / 4);
        copied(FIRST_TASKS - 1, 2 * LONG);
        assert!(!begins(&mut further[0]).await, "few pieces took long");
        copied(1, 2 * LONG);
        let last = further.pop().expect("one more");
        for task in further {
            assert!(task.await);
        }
        copied(64 * FIRST_TASKS, 2 * LONG);
        let begun = crew.pace.lock().expect("no panic").begun;
        assert_eq!(begun, 64, "no more tasks begin than there are");
        crew.end();
        assert!(!last.await, "nothing is left to copy");
    }

    /// Polls once; returns whether the task begins.
    async fn begins(task: &mut (impl Future<Output = bool> + Unpin)) -> bool {
        tokio::select! {
            biased;
            begins = task => begins,
            () = std::future::ready(()) => false,
        }
    }
}
