//! The disks of a server with a control socket.

use std::collections::BTreeMap;
use std::sync::Arc;

use nbd_server::export::{Checkpointed, ExportEntry, ImageExport};
use serde_json::{Value, json};

use crate::serving::image::Opened;
use nbd_jobs::control::{ErrorKind, Failure};

/// Identifies one connection to the control socket; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ConversationId(pub(super) u64);

/// An exported disk.
pub(super) struct Disk {
    pub(super) source: String,
    pub(super) export: Arc<Checkpointed>,
    /// The image, if it is one.
    pub(super) image: Option<Arc<ImageExport>>,
    pub(super) checkpoint: Option<RunningCheckpoint>,
}

/// A checkpoint in progress.
#[derive(Debug, Clone)]
pub(super) struct RunningCheckpoint {
    /// Name of the view's export.
    pub(super) view: String,
    pub(super) bitmap: Option<CheckpointBitmap>,
    /// The connection with which it ends, if any.
    pub(super) conversation: Option<ConversationId>,
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

impl Disk {
    pub(super) fn new(source: String, opened: Opened) -> Self {
        let export = Arc::new(Checkpointed::new(opened.export));
        Self { source, export, image: opened.image, checkpoint: None }
    }

    /// Returns the export to be registered.
    pub(super) fn entry(&self) -> ExportEntry {
        ExportEntry::new(self.export.clone())
    }

    /// Returns the image, or the reason why there is none.
    pub(super) fn image(&self) -> Result<Arc<ImageExport>, Failure> {
        self.image.clone().ok_or_else(|| {
            let message = format!("'{}' is not an image and has no bitmaps", self.source);
            Failure::new(ErrorKind::InvalidRequest, message)
        })
    }

    /// Returns the UUID of the disk, if it has one.
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

/// The disks by the names of their exports. Views are not among them.
#[derive(Default)]
pub(super) struct Disks {
    disks: BTreeMap<String, Disk>,
}

impl Disks {
    pub(super) fn insert(&mut self, name: String, disk: Disk) {
        self.disks.insert(name, disk);
    }

    pub(super) fn remove(&mut self, name: &str) -> Option<Disk> {
        self.disks.remove(name)
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.disks.keys().cloned().collect()
    }

    pub(super) fn get(&self, name: &str) -> Result<&Disk, Failure> {
        self.disks.get(name).ok_or_else(|| not_found(name))
    }

    pub(super) fn get_mut(&mut self, name: &str) -> Result<&mut Disk, Failure> {
        self.disks.get_mut(name).ok_or_else(|| not_found(name))
    }
}

fn not_found(name: &str) -> Failure {
    Failure::new(ErrorKind::NotFound, format!("there is no disk exported as '{name}'"))
}
