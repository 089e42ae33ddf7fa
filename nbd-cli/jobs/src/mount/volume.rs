//! Read-only file systems in partitions, for `--files`.
//!
//! Their bytes are a guest's. Each file system has a thread of its own, which carries out one
//! request after the other; the reads of each request are counted, so that a file system that leads
//! in circles costs a moment and no more. A panic of a parser makes the request fail, not the
//! program.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};

use fuser::Errno;

use super::disk::MountedDisk;
use super::file_system::{FileInfo, FileSystem, Name};
use super::part_reader::PartReader;
use super::{ext4, fat};
use crate::tasks;

/// A kind of file system that is understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum VolumeKind {
    Ext,
    Fat,
}

/// Work for the thread of a file system.
type Work = Box<dyn FnOnce(&mut dyn FileSystem) + Send>;

/// A file system in a part of a disk. Nothing of it is parsed before the first request.
pub(super) struct Volume {
    disk: Arc<MountedDisk>,
    range: Range<u64>,
    kind: VolumeKind,
    thread: Mutex<Option<Sender<Work>>>,
}

impl Volume {
    /// Recognises the file system in a part of a disk.
    pub(super) fn find(disk: &Arc<MountedDisk>, range: Range<u64>) -> Option<Self> {
        let mut start = [0; 2048];
        if range.end.saturating_sub(range.start) < start.len() as u64 {
            return None;
        }
        disk.read(range.start, &mut start).ok()?;
        let kind = if start[1024 + 56..][..2] == [0x53, 0xef] {
            VolumeKind::Ext
        } else if start[510..512] == [0x55, 0xaa]
            && (start[54..57] == *b"FAT" || start[82..85] == *b"FAT")
        {
            VolumeKind::Fat
        } else {
            return None;
        };
        Some(Self { disk: Arc::clone(disk), range, kind, thread: Mutex::default() })
    }

    pub(super) fn info(&self, path: &[u8]) -> Result<FileInfo, Errno> {
        let path = path.to_vec();
        self.ask(move |system| system.info(&path))
    }

    /// Lists a directory. Names that files cannot have are left out.
    pub(super) fn list(&self, path: &[u8]) -> Result<Vec<Name>, Errno> {
        let path = path.to_vec();
        let mut names = self.ask(move |system| system.list(&path))?;
        names.retain(|(name, _)| is_name(name));
        Ok(names)
    }

    pub(super) fn link(&self, path: &[u8]) -> Result<Vec<u8>, Errno> {
        let path = path.to_vec();
        self.ask(move |system| system.link(&path))
    }

    pub(super) fn read(&self, path: &[u8], offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
        let path = path.to_vec();
        self.ask(move |system| system.read(&path, offset, length))
    }

    /// Lets the thread of the file system do something, and waits for it.
    fn ask<T: Send + 'static>(
        &self,
        act: impl FnOnce(&mut dyn FileSystem) -> Result<T, Errno> + Send + 'static,
    ) -> Result<T, Errno> {
        let (done, result) = mpsc::channel();
        let work: Work = Box::new(move |system| {
            // Its receiver waits.
            let _ = done.send(act(system));
        });
        self.thread()?.send(work).map_err(|_| self.failed())?;
        result.recv().map_err(|_| self.failed())?
    }

    /// The parser has panicked: the next request begins with a new one.
    fn failed(&self) -> Errno {
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Errno::EIO
    }

    fn thread(&self) -> Result<Sender<Work>, Errno> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = &*thread {
            return Ok(sender.clone());
        }
        let (sender, receiver) = mpsc::channel();
        let (disk, range, kind) = (Arc::clone(&self.disk), self.range.clone(), self.kind);
        tasks::start_thread("files", move || run(kind, PartReader::new(disk, range), &receiver))
            .map_err(|_| Errno::EAGAIN)?;
        *thread = Some(sender.clone());
        Ok(sender)
    }
}

/// The thread of a file system. It ends with the volume, or when a parser fails.
fn run(kind: VolumeKind, reader: PartReader, requests: &Receiver<Work>) {
    let budget = reader.budget();
    let serve = |system: &mut dyn FileSystem| {
        while let Ok(work) = requests.recv() {
            budget.renew();
            work(system);
        }
    };
    // The state of the parser is not used after a panic.
    let _ = catch_unwind(AssertUnwindSafe(|| match kind {
        VolumeKind::Ext => ext4::open(reader, serve),
        VolumeKind::Fat => fat::open(reader, serve),
    }));
}

fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && name != b"."
        && name != b".."
        && !name.contains(&b'/')
        && !name.contains(&0)
}
