//! Checkpoints that start at one moment: while no disk is written to.
//!
//! Each disk has a thread that waits for its writes in flight, holds others back and changes its
//! bitmap. When all are ready, all checkpoints start. If one fails or takes too long, none does:
//! each thread undoes its change and lets writes go on, as soon as its disk answers.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nbd_server::export::{Checkpointed, ImageExport};

use super::checkpoint_bitmap::{
    CheckpointTerms, StartedCheckpoint, begin, not_ready, settle, start_with_bitmap,
};
use super::disks::{ConnectionId, Turn};
use crate::control::{ErrorKind, Failure, Outcome};
use crate::tasks;

/// A checkpoint that is about to be started.
pub(super) struct Prepared {
    pub(super) disk: Arc<Checkpointed>,
    pub(super) bitmap: Option<(Arc<ImageExport>, String)>,
    pub(super) terms: CheckpointTerms,
    /// Name of the view's export.
    pub(super) view: String,
    pub(super) connection: Option<ConnectionId>,
    /// Until its thread has ended, too.
    pub(super) _turn: Turn,
}

impl Prepared {
    /// Starts the checkpoint if `then`, which is called while the disk is not written to, succeeds.
    fn start(
        &self,
        then: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<StartedCheckpoint, Failure> {
        match &self.bitmap {
            Some((image, name)) => {
                start_with_bitmap(&self.disk, image, name.clone(), &self.terms, then)
            }
            None => begin(&self.disk, &self.terms, then).map(StartedCheckpoint::without_bitmap),
        }
    }

    /// As [`start`](Self::start); a panic is a failure too, because others wait for this disk.
    fn try_to_start(
        &self,
        then: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<StartedCheckpoint, Failure> {
        let mut was_ready = false;
        let mut ready = || {
            was_ready = true;
            then()
        };
        let started = catch_unwind(AssertUnwindSafe(|| self.start(&mut ready)));
        started.unwrap_or_else(|_| {
            // Before that, there may be another checkpoint, which stays.
            if was_ready {
                self.disk.end();
            }
            let message = "the checkpoint failed because of a mistake in this program; please \
                           report it";
            Err(Failure::new(ErrorKind::Failed, message))
        })
    }

    /// Ends a checkpoint that was started, because another one was not.
    fn undo(&self, started: &StartedCheckpoint) {
        self.disk.end();
        if let (Some((image, _)), Some(bitmap)) = (&self.bitmap, &started.bitmap) {
            // The failure that led here is reported.
            let _ = settle(image, bitmap, Outcome::Failure, &*self.terms.observer);
        }
    }
}

/// How far a disk is.
enum Progress {
    Working,
    /// It is not written to.
    Ready,
    Ended(Result<StartedCheckpoint, Failure>),
}

struct State {
    disks: Vec<Progress>,
    /// Whether the checkpoints start.
    decision: Option<bool>,
}

/// The moment of the checkpoints.
struct Moment {
    state: Mutex<State>,
    changed: Condvar,
}

impl Moment {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, deadline: Instant) -> MutexGuard<'a, State> {
        let rest = deadline.saturating_duration_since(Instant::now());
        self.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0
    }

    fn set(&self, index: usize, progress: Progress) {
        if let Some(disk) = self.lock().disks.get_mut(index) {
            *disk = progress;
        }
        self.changed.notify_all();
    }

    /// Tells that a disk is ready, and waits for the others.
    fn come(&self, index: usize) -> Result<(), Failure> {
        self.set(index, Progress::Ready);
        let mut state = self.lock();
        loop {
            match state.decision {
                Some(true) => return Ok(()),
                Some(false) => {
                    let message = "the checkpoint of another disk could not be started";
                    return Err(Failure::new(ErrorKind::Failed, message));
                }
                None => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Waits until all disks are ready, and decides; then until those that were ready have ended.
    fn decide(&self, all: &[Arc<Prepared>], patience: Duration) -> Result<(), Failure> {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        let failure = loop {
            let failed = state.disks.iter().find_map(|disk| match disk {
                Progress::Ended(Err(failure)) => Some(failure.clone()),
                _ => None,
            });
            if failed.is_some() {
                break failed;
            }
            let working = state.disks.iter().position(|disk| matches!(disk, Progress::Working));
            let Some(late) = working.and_then(|at| all.get(at)) else { break None };
            if Instant::now() >= deadline {
                break Some(not_ready(&late.terms));
            }
            state = self.wait(state, deadline);
        };
        state.decision = Some(failure.is_none());
        self.changed.notify_all();
        // What is ready needs no disk to start, but to be as it was.
        let deadline = failure.as_ref().map(|_| Instant::now() + patience);
        while state.disks.iter().any(|disk| matches!(disk, Progress::Ready))
            && deadline.is_none_or(|deadline| Instant::now() < deadline)
        {
            state = self.wait(state, deadline.unwrap_or_else(|| Instant::now() + patience));
        }
        failure.map_or(Ok(()), Err)
    }
}

/// Starts checkpoints at one moment, all or none. Blocks: for twice `patience` at most, even if a
/// disk hangs.
pub(super) fn start_all(
    all: &[Arc<Prepared>],
    patience: Duration,
) -> Result<Vec<StartedCheckpoint>, Failure> {
    let disks = all.iter().map(|_| Progress::Working).collect();
    let state = Mutex::new(State { disks, decision: None });
    let moment = Arc::new(Moment { state, changed: Condvar::new() });
    for (index, one) in all.iter().enumerate() {
        let (one, own) = (Arc::clone(one), Arc::clone(&moment));
        let thread = tasks::start_thread("checkpoint", move || {
            let started = one.try_to_start(&mut || own.come(index));
            // The disk is free when the end is known.
            drop(one);
            own.set(index, Progress::Ended(started));
        });
        if let Err(error) = thread {
            let message = format!("cannot start a thread for a checkpoint: {error}");
            let failure = Failure::new(ErrorKind::Failed, message);
            moment.set(index, Progress::Ended(Err(failure)));
        }
    }
    moment.decide(all, patience)?;
    let disks = std::mem::take(&mut moment.lock().disks);
    let (mut checkpoints, mut failure) = (Vec::with_capacity(all.len()), None);
    for (one, disk) in all.iter().zip(disks) {
        match disk {
            Progress::Ended(Ok(started)) => checkpoints.push((one, started)),
            Progress::Ended(Err(failed)) => failure = failure.or(Some(failed)),
            // All have ended.
            Progress::Working | Progress::Ready => {}
        }
    }
    // Only a panic makes a disk fail that was ready.
    let Some(failure) = failure else {
        return Ok(checkpoints.into_iter().map(|(_, started)| started).collect());
    };
    checkpoints.iter().for_each(|(one, started)| one.undo(started));
    Err(failure)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::thread;

    use imgfmt::{CreateOptions, Format, Image};
    use nbd_proto::wire::Errno;
    use nbd_server::export::{Durability, Export, ExportError, ExportInfo, MemoryExport};
    use nbd_server::{ExportRegistry, Server, ServerConfig};
    use serde_json::Value;
    use tokio::time::timeout;

    use super::*;
    use crate::control::decode;
    use crate::control::server::{Controller, ServedDisk, ServedDisks};

    /// A disk whose writes tell that they have begun, and wait until they may end.
    struct Hanging {
        disk: MemoryExport,
        begun: Mutex<mpsc::Sender<()>>,
        end: Mutex<mpsc::Receiver<()>>,
    }

    impl Export for Hanging {
        fn info(&self) -> ExportInfo {
            self.disk.info()
        }
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
            self.disk.read_at(offset, buffer)
        }
        fn write_at(&self, _: u64, _: &[u8], _: Durability) -> Result<(), ExportError> {
            self.begun.lock().unwrap().send(()).unwrap();
            self.end.lock().unwrap().recv().map_err(|_| ExportError::new(Errno::EIO, "the end"))
        }
    }

    /// A server of the disks 'a' and 'b', and these; a write to 'b' hangs until it is told to end.
    struct Place {
        controller: Arc<Controller>,
        a: Arc<Checkpointed>,
        b: Arc<Checkpointed>,
        begun: mpsc::Receiver<()>,
        end: mpsc::Sender<()>,
    }

    /// A disk that fails by a mistake after so many looks at it.
    struct Mistaken(MemoryExport, AtomicUsize);

    impl Export for Mistaken {
        fn info(&self) -> ExportInfo {
            assert_ne!(self.1.fetch_sub(1, Ordering::SeqCst), 0, "a mistake");
            self.0.info()
        }
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
            self.0.read_at(offset, buffer)
        }
    }

    impl Place {
        async fn new() -> Self {
            let ((sender, begun), (end, receiver)) = (mpsc::channel(), mpsc::channel());
            let disk = MemoryExport::new(1 << 20);
            let hanging = Hanging { disk, begun: sender.into(), end: receiver.into() };
            let a = ServedDisk::new("a", Arc::new(MemoryExport::new(1 << 20)));
            let patience = Duration::from_millis(500);
            Self { begun, end, ..Self::with(a, Arc::new(hanging), patience).await }
        }

        /// The same with other disks, and this time for them.
        async fn with(a: ServedDisk, b: Arc<dyn Export>, patience: Duration) -> Self {
            let server = Server::new(ServerConfig::default(), ExportRegistry::new()).start();
            let mut controller = Controller::new(server.handle().clone(), ServedDisks::default());
            controller.patience = patience;
            let b = ServedDisk::new("b", b);
            let (a_disk, b_disk) = (a.export.clone(), b.export.clone());
            controller.add_export("a", a).await.unwrap();
            controller.add_export("b", b).await.unwrap();
            let (begun, end) = (mpsc::channel().1, mpsc::channel().0);
            Self { controller: Arc::new(controller), a: a_disk, b: b_disk, begun, end }
        }

        async fn ask(&self, request: &str) -> Result<Value, Failure> {
            let request = decode(request.as_bytes()).unwrap();
            self.controller.execute(request, ConnectionId(1)).await
        }
    }

    const TOGETHER: &str =
        r#"{"command":"checkpoint-start-together","checkpoints":[{"export":"a"},{"export":"b"}]}"#;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_disk_whose_write_hangs_is_named_and_no_checkpoint_is_started() {
        let place = Place::new().await;
        let b = Arc::clone(&place.b);
        let write = move || b.write_at(0, &[7; 512], Durability::Cached).unwrap();
        let hanging = thread::spawn(write);
        place.begun.recv().unwrap();
        let refused = place.ask(TOGETHER).await.unwrap_err();
        assert!(refused.message.contains("no checkpoint was started: after 0.5 s, writes to 'b'"));
        assert_eq!((place.a.failure(), place.b.failure()), (None, None));
        place.a.write_at(0, &[7; 512], Durability::Cached).unwrap();
        // The other disk is as usable.
        place.ask(r#"{"command":"checkpoint-start","export":"a"}"#).await.unwrap();
        let end = r#"{"command":"checkpoint-end","export":"a","outcome":"success"}"#;
        place.ask(end).await.unwrap();
        let refused = place.ask(r#"{"command":"checkpoint-start","export":"b"}"#).await;
        assert!(refused.unwrap_err().message.contains("writes to 'b'"));
        place.end.send(()).unwrap();
        hanging.join().unwrap();
        place.ask(TOGETHER).await.unwrap();
        assert_eq!((place.a.failure(), place.b.failure()), (Some(None), Some(None)));
        let again = place.ask(TOGETHER).await.unwrap_err();
        assert_eq!(again.kind, ErrorKind::AlreadyExists, "{again}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_mistake_in_one_thread_fails_the_request_and_leaves_no_checkpoint() {
        let directory = tempfile::tempdir().unwrap();
        let new = CreateOptions::new(Format::Qcow2, 1 << 20);
        let image = Image::create(directory.path().join("a.qcow2"), &new).unwrap();
        let image = Arc::new(ImageExport::new(image));
        let mistaken = Arc::new(Mistaken(MemoryExport::new(1 << 20), usize::MAX.into()));
        let a = ServedDisk::of_image("a", image.clone());
        let place = Place::with(a, mistaken.clone(), Duration::from_secs(60)).await;
        let both = TOGETHER.replace(r#""a""#, r#""a","bitmap":"daily","if-missing":"add""#);
        // Before its disk is ready, and when all are.
        for looks in [0, 1] {
            mistaken.1.store(looks, Ordering::SeqCst);
            let refused = timeout(Duration::from_secs(120), place.ask(&both)).await;
            let refused = refused.expect("an answer").unwrap_err();
            assert!(refused.message.contains("a mistake in this program"), "{refused}");
            assert_eq!((place.a.failure(), place.b.failure()), (None, None));
            assert!(image.image().bitmaps().is_empty());
        }
        place.ask(&both).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn requests_about_other_disks_are_carried_out_while_one_hangs() {
        let place = Place::new().await;
        // As a request does that hangs.
        let (hanging, disks) = place.controller.turn("b", Duration::ZERO).await.unwrap();
        drop(disks);
        let list = place.ask(r#"{"command":"list"}"#).await.unwrap();
        assert_eq!(list["exports"].as_array().unwrap().len(), 2);
        place.ask(r#"{"command":"checkpoint-start","export":"a"}"#).await.unwrap();
        let end = r#"{"command":"checkpoint-end","export":"a","outcome":"failure"}"#;
        place.ask(end).await.unwrap();
        let memory = ServedDisk::new("c", Arc::new(MemoryExport::new(1 << 20)));
        place.controller.add_export("c", memory).await.unwrap();
        for refused in [TOGETHER, r#"{"command":"remove-export","name":"b"}"#] {
            let refused = place.ask(refused).await.unwrap_err();
            assert!(refused.message.contains("another request about 'b' is still being"));
        }
        place.ask(r#"{"command":"remove-export","name":"a"}"#).await.unwrap();
        let disks = place.controller.disks.lock().await;
        assert!(disks.refuse_working().is_err(), "nothing takes the server over");
        drop(disks);
        place.ask(r#"{"command":"shutdown"}"#).await.unwrap();
        place.controller.shutdown_requested().await;
        drop(hanging);
        place.ask(r#"{"command":"remove-export","name":"b"}"#).await.unwrap();
    }
}
