//! Which parts of an upload have arrived, in a file.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::crypto::hex;

/// Largest file that is read, in bytes: 10,000 parts have 2 MiB.
const FILE_MAX: u64 = 16 << 20;

/// Interrupted beginnings that are recorded.
const INTENTS_MAX: usize = 8;

/// A part that has arrived.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Part {
    /// What the store calls it.
    pub(super) etag: String,
    pub(super) sha256: String,
    pub(super) md5: String,
}

/// The record of an upload. If it cannot be written, the next push starts anew. Another push of the
/// same image to the same object has to wait: their parts would be those of one upload.
#[derive(Debug, Default)]
pub(super) struct Record {
    _lock: Option<Lock>,
    path: Option<PathBuf>,
    state: State,
    /// Parts that the file does not have.
    unwritten: usize,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct State {
    upload: Option<String>,
    parts: Vec<Option<Part>>,
    /// Uploads that were to begin, and are not known to have begun.
    #[serde(default)]
    intents: Vec<Intent>,
}

/// What the store had when a push was about to begin an upload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Intent {
    /// Uploads of the object.
    pub(super) others: Vec<String>,
    /// By the clock of the store, in seconds since 1970.
    pub(super) time: u64,
}

impl Record {
    /// Opens the record of the push with this identity; `None` if another process has it.
    pub(super) fn open(directory: Option<&Path>, identity: &str) -> Option<Self> {
        let digest = openssl::sha::sha256(identity.as_bytes());
        let name = format!("{}.push", hex(&digest[..16]));
        let path = directory.map(|directory| directory.join(name));
        let lock = match path.as_ref().map(|path| Lock::take(path.with_extension("lock"))) {
            Some(Ok(None)) => return None,
            Some(Ok(lock)) => lock,
            Some(Err(error)) => {
                tracing::debug!(%error, "the progress of the push cannot be recorded");
                return Some(Self::default());
            }
            None => None,
        };
        let state = path.as_deref().and_then(read).unwrap_or_default();
        Some(Self { _lock: lock, path, state, unwritten: 0 })
    }

    pub(super) fn upload(&self) -> Option<&str> {
        self.state.upload.as_deref()
    }

    /// Records that an upload is about to begin.
    pub(super) fn intend(&mut self, intent: Intent) {
        let excess = (self.state.intents.len() + 1).saturating_sub(INTENTS_MAX);
        self.state.intents.drain(..excess);
        self.state.intents.push(intent);
        self.write();
    }

    pub(super) fn begin(&mut self, upload: &str, is_intended: bool) {
        if is_intended {
            self.state.intents.pop();
        }
        (self.state.upload, self.state.parts) = (Some(upload.to_owned()), Vec::new());
        self.write();
    }

    pub(super) fn intents(&self) -> &[Intent] {
        &self.state.intents
    }

    pub(super) fn forget_intents(&mut self) {
        self.state.intents.clear();
        self.write();
    }

    pub(super) fn part(&self, index: u64) -> Option<Part> {
        self.state.parts.get(usize::try_from(index).ok()?)?.clone()
    }

    pub(super) fn add(&mut self, index: u64, part: Part) {
        let Ok(index) = usize::try_from(index) else { return };
        if self.state.parts.len() <= index {
            self.state.parts.resize(index + 1, None);
        }
        let is_new = self.state.parts[index].as_ref() != Some(&part);
        self.state.parts[index] = Some(part);
        self.unwritten += usize::from(is_new);
        // Seldom, once the file is long.
        if self.unwritten > self.state.parts.len() / 64 {
            self.write();
        }
    }

    /// Returns the parts in order.
    pub(super) fn parts(&self) -> Vec<Part> {
        self.state.parts.iter().flatten().cloned().collect()
    }

    /// Forgets the upload, which the store has lost.
    pub(super) fn forget_upload(&mut self) {
        (self.state.upload, self.state.parts) = (None, Vec::new());
        self.write();
    }

    /// Forgets everything: the upload is complete.
    pub(super) fn forget(&mut self) {
        (self.state, self.unwritten) = (State::default(), 0);
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }

    fn write(&mut self) {
        self.unwritten = 0;
        let Some(path) = &self.path else { return };
        if let Err(error) = write(path, &self.state) {
            tracing::debug!(%error, "the progress of the push cannot be recorded");
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if self.unwritten > 0 {
            self.write();
        }
    }
}

/// A file that one process has at a time, and removes.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: fs::File,
}

impl Lock {
    /// Returns `None` if another process has it.
    fn take(path: PathBuf) -> std::io::Result<Option<Self>> {
        if let Some(directory) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
        loop {
            let mut options = fs::OpenOptions::new();
            options.write(true).create(true).truncate(false).mode(0o600);
            let file = options.open(&path)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                locked => locked?,
            }
            // The one who had it may have removed the file meanwhile.
            let own = file.metadata()?;
            let is_there = fs::metadata(&path).is_ok_and(|it| it.ino() == own.ino());
            if is_there {
                return Ok(Some(Self { path, _file: file }));
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn read(path: &Path) -> Option<State> {
    let is_short = fs::metadata(path).ok()?.len() <= FILE_MAX;
    let text = is_short.then(|| fs::read(path).ok())??;
    serde_json::from_slice(&text).ok()
}

/// Replaces the file: a crash leaves the old or the new one.
fn write(path: &Path, state: &State) -> std::io::Result<()> {
    let new = path.with_extension(format!("push.{}", std::process::id()));
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec(state)?)?;
    fs::rename(&new, path)
}
