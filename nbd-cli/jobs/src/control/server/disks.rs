//! The disks that a control socket manages.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use imgfmt::Image;
use nbd_server::export::{Checkpointed, Export, ExportEntry, ImageExport};
use serde_json::{Value, json};
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::files::DiskFiles;
use super::openings::taken_over;
use super::streaming::Streaming;
use crate::control::{ErrorKind, Failure};
use crate::text::printable;

/// Identifies one connection to the control socket; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ConnectionId(pub(super) u64);

/// What a request holds while it is about a disk, and also its thread, whose I/O may hang: others
/// about the same disk wait, and none about another one.
pub(super) type Turn = Arc<OwnedMutexGuard<()>>;

/// A disk that is exported with checkpoints.
pub struct ServedDisk {
    pub(super) source: String,
    /// The source in one notation, and what is served of it.
    pub(super) identity: (String, String),
    pub(super) export: Arc<Checkpointed>,
    /// The image, if it is one.
    pub(super) image: Option<Arc<ImageExport>>,
    pub(super) checkpoint: Option<RunningCheckpoint>,
    pub(super) entry: ExportEntry,
    pub(super) reopen: Option<Arc<Reopen>>,
    /// The last stream into the image.
    pub(super) streaming: Option<Streaming>,
    pub(super) turn: Arc<Mutex<()>>,
    /// Held while a thread looks at the bitmaps.
    pub(super) look: Arc<Mutex<()>>,
}

/// Opens a disk again that was closed. Called on a thread that may block.
pub type Reopen = dyn Fn() -> Result<ServedDisk, Failure> + Send + Sync;

/// A checkpoint in progress.
#[derive(Debug, Clone)]
pub(super) struct RunningCheckpoint {
    /// Name of the view's export.
    pub(super) view: String,
    pub(super) bitmap: Option<CheckpointBitmap>,
    /// The connection with which it ends, if any.
    pub(super) connection: Option<ConnectionId>,
}

/// The bitmap of a checkpoint.
#[derive(Debug, Clone)]
pub(super) struct CheckpointBitmap {
    pub(super) name: String,
    pub(super) origin: BitmapOrigin,
}

/// The state of the bitmap before its checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BitmapOrigin {
    /// It was added at the checkpoint.
    Added,
    /// The disk's export offered it, and will offer it again.
    Offered,
    /// The disk's export did not offer it.
    NotOffered,
}

impl CheckpointBitmap {
    /// Name of the bitmap that holds its earlier bits.
    pub(super) fn frozen(&self) -> String {
        imgfmt::frozen_bitmap_name(&self.name)
    }
}

impl ServedDisk {
    /// A disk without bitmaps. `source` is what clients of the control socket see as its source.
    #[must_use]
    pub fn new(source: impl Into<String>, export: Arc<dyn Export>) -> Self {
        let export = Arc::new(Checkpointed::new(export));
        let entry = ExportEntry::new(export.clone());
        let (source, reopen) = (source.into(), None);
        let identity = (source.clone(), String::new());
        let (turn, look) = Default::default();
        Self {
            source,
            identity,
            export,
            image: None,
            checkpoint: None,
            entry,
            reopen,
            streaming: None,
            turn,
            look,
        }
    }

    /// An image, with its bitmaps.
    #[must_use]
    pub fn of_image(source: impl Into<String>, image: Arc<ImageExport>) -> Self {
        Self::new(source, image.clone()).with_image(image)
    }

    /// The image of which the export is a part or a filtered form: its bitmaps are those of the
    /// disk.
    #[must_use]
    pub fn with_image(mut self, image: Arc<ImageExport>) -> Self {
        self.image = Some(image);
        self
    }

    /// Sets the notation of the source by which it is compared with that of another program, and
    /// what is served of it, such as a part or a snapshot, in words.
    #[must_use]
    pub fn identified_by(mut self, source: impl Into<String>, view: impl Into<String>) -> Self {
        self.identity = (source.into(), view.into());
        self
    }

    /// Sets how the disk is opened again after it was closed for a takeover that failed. A disk
    /// without this would be lost: a server that has one is not taken over.
    #[must_use]
    pub fn reopened_by(
        mut self,
        reopen: impl Fn() -> Result<Self, Failure> + Send + Sync + 'static,
    ) -> Self {
        self.reopen = Some(Arc::new(reopen));
        self
    }

    /// Changes the properties of the export, such as its description.
    #[must_use]
    pub fn configured(mut self, configure: impl FnOnce(ExportEntry) -> ExportEntry) -> Self {
        self.entry = configure(self.entry);
        self
    }

    /// Returns the export to be registered. Only writes through it are seen by checkpoints.
    #[must_use]
    pub fn entry(&self) -> ExportEntry {
        self.entry.clone()
    }

    /// Refuses what cannot be done while a stream runs.
    pub(super) fn refuse_streaming(&self, export: &str) -> Result<(), Failure> {
        if !self.streaming.as_ref().is_some_and(Streaming::is_running) {
            return Ok(());
        }
        let message = format!(
            "a stream into '{}' is running; wait for its end, or end it with \
             'nbd-cli control stream --cancel', and go on later",
            printable(export)
        );
        Err(Failure::new(ErrorKind::InUse, message))
    }

    /// Returns the image, or the reason why there is none.
    pub(super) fn image(&self) -> Result<Arc<ImageExport>, Failure> {
        self.image.clone().ok_or_else(|| {
            let message = format!("'{}' is not an image and has no bitmaps", self.source);
            Failure::new(ErrorKind::InvalidRequest, message)
        })
    }

    /// Returns what the disk consists of.
    pub(super) fn files(&self) -> DiskFiles {
        let image = self.image.as_ref().map(|image| image.image());
        let files = image.map(DiskFiles::of);
        let (mut source, view) = self.identity.clone();
        // Layers on servers have no identity but the names in the images above them.
        for layer in image.into_iter().flat_map(Image::other_layers) {
            if !layer.as_os_str().is_empty() {
                source.push_str(" above ");
                source.push_str(&layer.to_string_lossy());
            }
        }
        DiskFiles { source, view, ..files.unwrap_or_default() }
    }

    /// Returns the UUID of the disk, if it has one. May block, unless the caller has the turn.
    pub(super) fn id(&self) -> Option<String> {
        self.image.as_ref()?.image().disk_id().map(|id| id.to_string())
    }

    pub(super) fn describe_checkpoint(&self) -> Option<Value> {
        let checkpoint = self.checkpoint.as_ref()?;
        Some(json!({
            "view": checkpoint.view,
            "bitmap": checkpoint.bitmap.as_ref().map(|bitmap| &bitmap.name),
            "problem": self.export.failure().flatten(),
        }))
    }
}

impl std::fmt::Debug for ServedDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServedDisk")
            .field("source", &self.source)
            .field("checkpoint", &self.checkpoint)
            .finish_non_exhaustive()
    }
}

/// Disks by the names of their exports. Views are not among them.
#[derive(Debug, Default)]
pub struct ServedDisks {
    pub(super) disks: BTreeMap<String, ServedDisk>,
    /// What is alive until the images of disks that are not among these any more are closed, by the
    /// names of their exports.
    closing: Vec<(String, Weak<()>)>,
    /// The server is being taken over: no request is carried out.
    pub(super) is_suspended: bool,
}

impl ServedDisks {
    /// Adds a disk under the name under which its [entry](ServedDisk::entry) is registered. It
    /// replaces a disk of that name.
    pub fn insert(&mut self, name: impl Into<String>, disk: ServedDisk) {
        let name = name.into();
        if let Some(replaced) = self.disks.insert(name.clone(), disk) {
            self.note_closing(&name, &replaced);
        }
    }

    /// Remembers a disk that is closed elsewhere, or when its last client leaves: until then no
    /// other program must open it.
    pub(super) fn note_closing(&mut self, name: &str, disk: &ServedDisk) {
        self.closing.retain(|(_, open)| open.strong_count() > 0);
        self.closing.extend(disk.image.as_ref().map(|image| (name.to_owned(), image.open())));
    }

    /// Refuses a takeover while an image of a removed disk is not closed yet.
    pub(super) fn refuse_closing(&self) -> Result<(), Failure> {
        let mut closing = self.closing.iter();
        let Some((name, _)) = closing.find(|(_, open)| open.strong_count() > 0) else {
            return Ok(());
        };
        let message = format!(
            "the image of the export '{name}', which was removed or not added, is still being closed; \
             wait until it is"
        );
        Err(Failure::new(ErrorKind::InUse, message))
    }

    /// Refuses a takeover while a request is about a disk.
    pub(super) fn refuse_working(&self) -> Result<(), Failure> {
        let mut disks = self.disks.iter();
        match disks.find(|(_, disk)| disk.turn.try_lock().is_err()) {
            Some((name, _)) => Err(still_working(name)),
            None => Ok(()),
        }
    }

    /// Takes the disks; those that are being closed are remembered by both.
    pub(super) fn take(&mut self) -> Self {
        let (disks, closing) = (std::mem::take(&mut self.disks), self.closing.clone());
        Self { disks, closing, is_suspended: false }
    }

    /// Refuses disks that are not those of another server, by the names of their exports. Names
    /// that only one of both has are none of its concern.
    ///
    /// # Errors
    ///
    /// If a disk is another one.
    pub(crate) fn check_same<'a>(
        &self,
        others: impl IntoIterator<Item = (&'a str, &'a DiskFiles)>,
    ) -> Result<(), Failure> {
        for (name, files) in others {
            if let Some(disk) = self.disks.get(name) {
                files.check_same(name, &disk.files())?;
            }
        }
        Ok(())
    }

    /// Removes the disk whose turn the caller has.
    pub(super) fn remove(&mut self, name: &str) -> Option<ServedDisk> {
        let removed = self.disks.remove(name)?;
        self.note_closing(name, &removed);
        Some(removed)
    }

    /// Returns the files of each disk, by the name of its export.
    pub(super) fn files(&self) -> Vec<(String, DiskFiles)> {
        self.disks.iter().map(|(name, disk)| (name.clone(), disk.files())).collect()
    }

    /// Refuses a takeover that would lose something.
    pub(super) fn check_takeover(&self) -> Result<(), Failure> {
        for (name, disk) in &self.disks {
            if disk.checkpoint.is_some() {
                let message = format!(
                    "a checkpoint of '{name}' is in progress; wait for the end of the backup"
                );
                return Err(Failure::new(ErrorKind::InUse, message));
            }
            disk.refuse_streaming(name)?;
            if disk.reopen.is_none() {
                let message = format!(
                    "the export '{name}' is in memory or temporary, and its data would be lost; \
                     remove it first"
                );
                return Err(Failure::new(ErrorKind::InUse, message));
            }
        }
        Ok(())
    }

    pub(super) fn refuse_if_suspended(&self) -> Result<(), Failure> {
        if self.is_suspended { Err(taken_over()) } else { Ok(()) }
    }

    /// The exports with a checkpoint, or with one that is bound to a connection.
    pub(super) fn with_checkpoint(&self, connection: Option<ConnectionId>) -> Vec<String> {
        let has_one = |disk: &ServedDisk| {
            let checkpoint = disk.checkpoint.as_ref();
            checkpoint.is_some_and(|it| connection.is_none() || it.connection == connection)
        };
        let found = self.disks.iter().filter(|(_, disk)| has_one(disk));
        found.map(|(name, _)| name.clone()).collect()
    }

    pub(super) fn get(&self, name: &str) -> Result<&ServedDisk, Failure> {
        self.disks.get(name).ok_or_else(|| not_found(name))
    }

    pub(super) fn get_mut(&mut self, name: &str) -> Result<&mut ServedDisk, Failure> {
        self.disks.get_mut(name).ok_or_else(|| not_found(name))
    }
}

/// The failure of a request that waited for an earlier one about the same disk.
pub(super) fn still_working(name: &str) -> Failure {
    let message = format!(
        "another request about '{}' is still being carried out; wait for its end, or mend what the \
         disk is on if it hangs",
        printable(name)
    );
    Failure::new(ErrorKind::InUse, message)
}

pub(super) fn not_found(name: &str) -> Failure {
    Failure::new(ErrorKind::NotFound, format!("there is no disk exported as '{name}'"))
}
