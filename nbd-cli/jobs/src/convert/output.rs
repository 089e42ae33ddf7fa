//! Standard output as the storage of a new image that is written in order.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use imgfmt::{Durability, HostOffset, Storage};

use crate::cancellation::Cancellation;
use crate::error::{JobError, JobErrorKind};
use crate::tasks;

/// How often a write that waits for the reader looks whether the job was cancelled.
const INTERVAL: Duration = Duration::from_millis(50);

/// Appends to standard output. A thread of its own writes, because its reader may never read on,
/// and that must not keep the job from being cancelled.
#[derive(Debug)]
pub(super) struct OutputStorage {
    state: Mutex<State>,
    cancellation: Cancellation,
}

#[derive(Debug)]
struct State {
    /// How much was written, in bytes.
    end: u64,
    writes: SyncSender<Vec<u8>>,
    results: Receiver<io::Result<()>>,
    /// Why nothing more is written.
    ended: Option<Ended>,
}

#[derive(Clone, Debug)]
enum Ended {
    ByReader,
    Failed(String),
    /// By the job, which is incomplete.
    Abandoned,
}

impl OutputStorage {
    /// # Errors
    ///
    /// If the system has no descriptor or no thread for it.
    pub(super) fn new(cancellation: Cancellation) -> Result<Self, JobError> {
        let failed =
            |error| JobError::destination(format!("cannot write to standard output: {error}"));
        // The standard library's is buffered by lines.
        let output = io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
        Self::to(output, cancellation).map_err(failed)
    }

    fn to(output: OwnedFd, cancellation: Cancellation) -> io::Result<Self> {
        let (writes, to_write) = sync_channel::<Vec<u8>>(1);
        let (written, results) = sync_channel(1);
        let mut output = File::from(output);
        let write_all = move || {
            for bytes in to_write {
                if written.send(output.write_all(&bytes)).is_err() {
                    return;
                }
            }
        };
        tasks::start_thread("output", write_all)?;
        let state = Mutex::new(State { end: 0, writes, results, ended: None });
        Ok(Self { state, cancellation })
    }

    /// From now on nothing is written: what was written is not to look complete.
    pub(super) fn abandon(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.ended.get_or_insert(Ended::Abandoned);
    }

    /// The error of the output itself, if it failed, or that of a cancelled job.
    pub(super) fn failure(&self) -> Option<JobError> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.ended.as_ref()? {
            Ended::ByReader => Some(JobError::new(
                JobErrorKind::OutputClosed,
                "cannot write to standard output: its reader has closed it",
            )),
            Ended::Failed(why) => {
                Some(JobError::destination(format!("cannot write to standard output: {why}")))
            }
            // The cancellation has made the write fail.
            Ended::Abandoned => self.cancellation.of_image_jobs().check().err().map(Into::into),
        }
    }

    /// Writes, and waits until that is done or the job is cancelled.
    fn append(&self, state: &mut State, data: &[u8]) -> Result<(), Ended> {
        let gone = || Ended::Failed("the thread that writes has ended unexpectedly".to_owned());
        state.writes.send(data.to_vec()).map_err(|_| gone())?;
        loop {
            match state.results.recv_timeout(INTERVAL) {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Err(Ended::ByReader);
                }
                Ok(Err(error)) => return Err(Ended::Failed(error.to_string())),
                Err(RecvTimeoutError::Timeout) if self.cancellation.is_cancelled() => {
                    return Err(Ended::Abandoned);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(gone()),
            }
        }
    }
}

impl Storage for OutputStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state.lock().unwrap_or_else(PoisonError::into_inner).end)
    }

    fn read_at(&self, _: HostOffset, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], _: Durability) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.ended.is_some() {
            return Err(io::Error::other("the output has ended"));
        }
        if offset.bytes() != state.end {
            return Err(io::Error::other("standard output can only be appended to"));
        }
        match self.append(&mut state, data) {
            Ok(()) => {
                state.end += data.len() as u64;
                Ok(())
            }
            Err(ended) => {
                state.ended = Some(ended);
                Err(io::Error::other("the output has ended"))
            }
        }
    }

    /// A pipe has nothing to wait for.
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::thread;

    use super::*;

    fn at(offset: u64) -> HostOffset {
        HostOffset::new(offset)
    }

    #[test]
    fn only_what_continues_is_written_and_nothing_after_the_end() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = OutputStorage::to(writer.into(), Cancellation::new()).unwrap();
        output.write_at(at(0), b"one", Durability::Cached).unwrap();
        assert!(output.write_at(at(2), b"x", Durability::Cached).is_err());
        assert!(output.write_at(at(4), b"x", Durability::Cached).is_err());
        output.write_at(at(3), b"two", Durability::Cached).unwrap();
        output.abandon();
        assert!(output.write_at(at(6), b"footer", Durability::Cached).is_err());
        assert!(output.failure().is_none());
        drop(output);
        let mut read = String::new();
        reader.read_to_string(&mut read).unwrap();
        assert_eq!(read, "onetwo");
    }

    #[test]
    fn a_reader_that_is_gone_is_told_apart_from_other_failures() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let output = OutputStorage::to(writer.into(), Cancellation::new()).unwrap();
        assert!(output.write_at(at(0), b"one", Durability::Cached).is_err());
        assert_eq!(output.failure().unwrap().kind(), JobErrorKind::OutputClosed);
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = OutputStorage::to(full.into(), Cancellation::new()).unwrap();
        assert!(output.write_at(at(0), b"one", Durability::Cached).is_err());
        let error = output.failure().unwrap();
        assert_eq!(error.kind(), JobErrorKind::Destination);
        assert!(error.to_string().contains("No space"), "{error}");
    }

    #[test]
    fn a_reader_that_does_not_read_does_not_keep_a_job_from_being_cancelled() {
        let (_reader, writer) = io::pipe().unwrap();
        let cancellation = Cancellation::new();
        let output = OutputStorage::to(writer.into(), cancellation.clone()).unwrap();
        thread::scope(|scope| {
            let writing = scope.spawn(|| output.write_at(at(0), &[1; 1 << 20], Durability::Cached));
            cancellation.cancel("interrupted");
            assert!(writing.join().unwrap().is_err());
        });
        let error = output.failure().unwrap();
        assert_eq!(error.kind(), JobErrorKind::Interrupted, "{error}");
    }
}
