//! Opens sources on threads of their own, so that one that hangs holds nothing else up.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::error::JobError;
use crate::tasks;

/// Maximum number of threads that open something: each that hangs holds files and their locks.
const OPENING_MAX: usize = 16;
static OPENING: Places = Places(AtomicUsize::new(0));

/// Counts threads.
struct Places(AtomicUsize);

/// The place of a thread, until it ends.
struct Place<'a>(&'a Places);

impl Places {
    fn take(&self) -> Option<Place<'_>> {
        let next = |count| (count < OPENING_MAX).then_some(count + 1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).ok().map(|_| Place(self))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What is being done, for an error that says so.
#[derive(Clone, Debug)]
pub struct Step(Arc<Mutex<String>>);

impl Step {
    /// Begins another step; `what` is a verb phrase such as "opening 'disk.img'".
    pub fn begin(&self, what: impl Into<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = what.into();
    }

    fn name(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Runs `open`, which may block, on a new thread, and waits for it at most for `limit`, or without
/// an end if that is zero. Until `open` begins a step of its own, `first` says what is being done.
///
/// ```
/// use std::time::Duration;
///
/// use nbd_jobs::opening::open_within;
/// # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
///
/// let opened = open_within(Duration::from_secs(60), "opening a disk", |_| 7).await?;
/// assert_eq!(opened, 7);
/// # Ok::<(), nbd_jobs::JobError>(())
/// # })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// If it takes longer, if `open` panics, if the system has no thread left, or if too many threads
/// are still opening something. After the time limit the thread is left to itself: nothing waits
/// for it, not even the end of the runtime, and it closes what it opens later.
///
/// # Cancel safety
///
/// Safe; the thread is left to itself, as after an error.
pub async fn open_within<T: Send + 'static>(
    limit: Duration,
    first: impl Into<String>,
    open: impl FnOnce(&Step) -> T + Send + 'static,
) -> Result<T, JobError> {
    open_in_place(&OPENING, limit, Step(Arc::new(Mutex::new(first.into()))), open).await
}

async fn open_in_place<T: Send + 'static>(
    places: &'static Places,
    limit: Duration,
    step: Step,
    open: impl FnOnce(&Step) -> T + Send + 'static,
) -> Result<T, JobError> {
    let Some(place) = places.take() else {
        return Err(JobError::source(format!(
            "{} was not begun: {OPENING_MAX} sources are still being opened, and their servers or \
             file systems may hang; mend them, or restart this server",
            step.name()
        )));
    };
    let (sender, opened) = oneshot::channel();
    let own = step.clone();
    let thread = tasks::start_thread("open", move || {
        // If it is waited for no longer, what is open is closed here.
        let _ = sender.send(open(&own));
        drop(place);
    });
    thread.map_err(|error| {
        JobError::source(format!("cannot start a thread for {}: {error}", step.name()))
    })?;
    match within(limit, opened).await.ok_or_else(|| too_slow(&step, limit))? {
        Ok(opened) => Ok(opened),
        // Only a panic ends the thread without a result.
        Err(_) => Err(JobError::source(format!(
            "{} failed because of a mistake in this program; please report it",
            step.name()
        ))),
    }
}

/// Waits for `work` at most for `limit`, or without an end if that is zero. Returns `None`, and
/// drops `work`, if it takes longer.
///
/// # Cancel safety
///
/// That of `work`.
pub async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    match limit.is_zero() {
        true => Some(work.await),
        false => tokio::time::timeout(limit, work).await.ok(),
    }
}

fn too_slow(step: &Step, limit: Duration) -> JobError {
    JobError::source(format!(
        "{} was given up after {} s: its server or file system may hang; mend or remove it, or set a \
         longer --open-timeout",
        step.name(),
        limit.as_secs_f64()
    ))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn run<T>(work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(work)
    }

    #[test]
    fn what_hangs_is_named_and_left_to_itself() {
        let (release, released) = mpsc::channel::<()>();
        let (closed, is_closed) = mpsc::channel();
        /// Tells that it is dropped.
        struct Image(mpsc::Sender<()>);
        impl Drop for Image {
            fn drop(&mut self) {
                let _ = self.0.send(());
            }
        }
        let hangs = move |step: &Step| {
            step.begin("opening 'b'");
            let _ = released.recv();
            Image(closed)
        };
        // The end of the runtime does not wait either.
        let outcome = run(open_within(Duration::from_secs(2), "opening 'a'", hangs));
        let error = outcome.map(drop).expect_err("it hangs").to_string();
        assert!(error.starts_with("opening 'b' was given up after 2 s"), "{error}");
        assert!(is_closed.try_recv().is_err());
        release.send(()).expect("the thread is there");
        is_closed.recv().expect("what is opened later is closed");
    }

    #[test]
    fn without_a_limit_it_waits() {
        let opened = run(open_within(Duration::ZERO, "opening", |_| Ok::<_, ()>(1)));
        assert_eq!(opened.expect("no limit"), Ok(1));
    }

    #[test]
    fn a_panic_is_an_error_that_names_the_step() {
        let outcome = run(open_within::<()>(Duration::ZERO, "opening 'a'", |_| panic!("mistake")));
        let error = outcome.expect_err("it failed").to_string();
        assert!(error.starts_with("opening 'a' failed because of a mistake"), "{error}");
    }

    #[test]
    fn only_so_many_sources_are_opened_at_a_time() {
        static PLACES: Places = Places(AtomicUsize::new(0));
        let open = || {
            let step = Step(Arc::new(Mutex::new("opening 'a'".to_owned())));
            run(open_in_place(&PLACES, Duration::ZERO, step, |_| PLACES.take().is_some()))
        };
        let mut taken: Vec<_> = (0..OPENING_MAX).filter_map(|_| PLACES.take()).collect();
        let error = open().expect_err("all places are taken").to_string();
        assert!(error.contains("was not begun: 16 sources are still being opened"), "{error}");
        taken.pop();
        assert!(!open().expect("there is a place"), "it took the last place");
    }
}
