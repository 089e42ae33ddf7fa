//! Streams what is below the image of a disk into it, while the disk is served.

use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use imgfmt::jobs::{Cancellation, JobContext, JobErrorKind, Observer, Progress, RateLimit};
use imgfmt::{GuestRange, Image, NewBase, jobs};
use nbd_server::export::ImageExport;

use super::event::{ControlEvent, ControlObserver};
use crate::control::{ErrorKind, Failure, StreamPhase, StreamState};
use crate::tasks;
use crate::text::printable;

/// The time until a layer that could not be read is read again.
const RETRY: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(10);
/// The time for a read of a layer that is under way when a stream is cancelled.
pub(super) const TIME_TO_STOP: Duration = Duration::from_secs(10);

/// A stream that runs, or the last one that did.
pub(super) struct Streaming {
    cancellation: Cancellation,
    shared: Arc<Shared>,
}

/// What the thread of a stream tells.
pub(super) struct Shared {
    state: Mutex<StreamState>,
    /// The last progress, or the start.
    progressed: Mutex<Instant>,
    export: String,
    observer: Arc<ControlObserver>,
}

/// A requested stream.
pub(super) struct StreamRequest {
    pub(super) base: Option<String>,
    pub(super) rate: Option<u64>,
}

impl Streaming {
    pub(super) fn start(
        export: &str,
        image: Arc<ImageExport>,
        request: StreamRequest,
        observer: Arc<ControlObserver>,
    ) -> Result<Self, Failure> {
        let base = request.base.map(|name| find_base(image.image(), name)).transpose()?;
        let state = StreamState { total: image.image().size(), ..StreamState::default() };
        let (state, progressed) = (Mutex::new(state), Mutex::new(Instant::now()));
        let shared = Shared { state, progressed, export: export.to_owned(), observer };
        let (cancellation, shared) = (Cancellation::new(), Arc::new(shared));
        let context = JobContext {
            observer: Arc::clone(&shared) as _,
            cancellation: cancellation.clone(),
            rate_limit: request.rate.and_then(NonZeroU64::new).map(RateLimit::new),
        };
        let told = Arc::clone(&shared);
        let started = tasks::start_thread("stream", move || {
            // After a panic, the state would say for ever that it runs.
            let ended = catch_unwind(AssertUnwindSafe(|| run(&image, base, &context, &told)));
            // The image is free when the end is shown.
            drop(image);
            told.end(ended);
        });
        started.map_err(|error| {
            Failure::new(ErrorKind::Failed, format!("cannot start a thread for it: {error}"))
        })?;
        Ok(Self { cancellation, shared })
    }

    pub(super) fn state(&self) -> StreamState {
        self.shared.state()
    }

    pub(super) fn is_running(&self) -> bool {
        self.shared.is_running()
    }

    /// Has the stream end. Returns what tells when it has.
    pub(super) fn cancel(&self, reason: &str) -> Arc<Shared> {
        self.cancellation.cancel(reason);
        Arc::clone(&self.shared)
    }
}

impl std::fmt::Debug for Streaming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.state().fmt(f)
    }
}

impl Drop for Streaming {
    fn drop(&mut self) {
        self.cancel("the export was closed");
    }
}

impl Shared {
    pub(super) fn state(&self) -> StreamState {
        let mut state = self.lock().clone();
        let progressed = *self.progressed.lock().unwrap_or_else(PoisonError::into_inner);
        state.idle = (!state.phase.is_over()).then(|| progressed.elapsed().as_secs());
        state
    }

    fn is_running(&self) -> bool {
        !self.lock().phase.is_over()
    }

    /// Waits until the stream has ended; returns whether it has.
    pub(super) async fn ended(&self, deadline: Instant) -> bool {
        while self.is_running() && Instant::now() < deadline {
            tokio::time::sleep(LOOK).await;
        }
        !self.is_running()
    }

    /// Notes that something was copied.
    fn runs(&self, state: &mut StreamState) {
        (state.phase, state.problem) = (StreamPhase::Running, None);
        *self.progressed.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, StreamState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, ended: std::thread::Result<Result<(), jobs::JobError>>) {
        let state = {
            let mut state = self.lock();
            (state.phase, state.problem) = match ended {
                Ok(Ok(())) => (StreamPhase::Complete, None),
                Ok(Err(error)) if error.kind() == JobErrorKind::Interrupted => {
                    (StreamPhase::Cancelled, None)
                }
                Ok(Err(error)) => (StreamPhase::Failed, Some(error.to_string())),
                Err(_) => (StreamPhase::Failed, Some("the stream has panicked".to_owned())),
            };
            state.clone()
        };
        (self.observer)(&ControlEvent::StreamEnded { export: &self.export, state: &state });
    }

    fn pause(&self, problem: &str) {
        let is_new = {
            let mut state = self.lock();
            state.phase = StreamPhase::Paused;
            state.problem.replace(problem.to_owned()).as_deref() != Some(problem)
        };
        if is_new {
            let (export, problem) = (&*self.export, problem);
            (self.observer)(&ControlEvent::StreamPaused { export, problem });
        }
    }
}

impl Observer for Shared {
    fn progress(&self, progress: &Progress) {
        let mut state = self.lock();
        // After a failure it looks at the beginning again, and copies only what is missing.
        if progress.done > state.done {
            self.runs(&mut state);
            state.done = progress.done;
        }
    }

    fn copied(&self, _: GuestRange) {
        self.runs(&mut self.lock());
    }
}

/// Streams until everything is copied, however often a layer below cannot be read.
fn run(
    image: &ImageExport,
    base: Option<(u32, String)>,
    context: &JobContext,
    shared: &Shared,
) -> Result<(), jobs::JobError> {
    loop {
        let base =
            base.as_ref().map(|(depth, name)| NewBase { depth: *depth, name: name.as_ref() });
        match jobs::stream_in_place(image.image(), base, context) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == JobErrorKind::Source => {
                shared.pause(&error.to_string());
            }
            Err(error) => return Err(error),
        }
        let again = Instant::now() + RETRY;
        while Instant::now() < again {
            context.cancellation.check()?;
            std::thread::sleep(LOOK);
        }
    }
}

/// The depth of the layer that is called `name`, which begins at the directory of the image.
fn find_base(image: &Image, name: String) -> Result<(u32, String), Failure> {
    let directory = image.path().and_then(Path::parent).unwrap_or(Path::new(""));
    match image.layer_in(&directory.join(&name)) {
        Some((depth, _)) => Ok((depth, name)),
        None => {
            let message = format!("'{}' is not a layer below the image", printable(&name));
            Err(Failure::new(ErrorKind::InvalidRequest, message))
        }
    }
}
