//! The messages of the control socket.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::traffic::Traffic;

/// Longest line in both directions, in bytes, without its line feed.
pub const MAX_LINE_LEN: usize = 64 << 10;

/// One of several checkpoints; the fields are as in [`Request::CheckpointStart`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct TogetherCheckpoint {
    /// Name of the export.
    pub export: String,
    /// The bitmap; without one, only the view is created.
    #[serde(default)]
    pub bitmap: Option<String>,
    /// Add the bitmap if it does not exist.
    #[serde(default)]
    pub if_missing: IfMissing,
    /// Restart an unreliable bitmap.
    #[serde(default)]
    pub if_unusable: IfUnusable,
    /// UUID of the backup on which the new one builds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
}

/// A request. Names are those of exports and of bitmaps in their images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub enum Request {
    /// List exports with their bitmaps, and clients
    List {},
    /// Export a file, a device or memory:SIZE
    AddExport {
        /// Name of the new export.
        name: String,
        /// The source of the export.
        source: String,
        /// Refuse all writes.
        #[serde(default)]
        read_only: bool,
        /// Format of the image; detected unless given.
        #[serde(default)]
        format: Option<String>,
        /// Description shown to clients.
        #[serde(default)]
        description: Option<String>,
    },
    /// Remove an export and close its image
    RemoveExport {
        /// Name of the export.
        name: String,
        /// Disconnect the clients that use it; without this, an export in use is kept.
        #[serde(default)]
        on_use: OnUse,
    },
    /// Add an empty bitmap
    BitmapAdd {
        /// Name of the export.
        export: String,
        /// Name of the new bitmap.
        bitmap: String,
        /// Bytes per bit: a power of two from 512 to 2G.
        #[serde(default)]
        granularity: Option<u64>,
        /// Do not record changes yet.
        #[serde(default)]
        initial: InitialState,
    },
    /// Remove a bitmap
    BitmapRemove {
        /// Name of the export.
        export: String,
        /// Name of the bitmap.
        bitmap: String,
    },
    /// Clear a bitmap
    BitmapClear {
        /// Name of the export.
        export: String,
        /// Name of the bitmap.
        bitmap: String,
    },
    /// Start recording changes
    BitmapEnable {
        /// Name of the export.
        export: String,
        /// Name of the bitmap.
        bitmap: String,
    },
    /// Stop recording changes
    BitmapDisable {
        /// Name of the export.
        export: String,
        /// Name of the bitmap.
        bitmap: String,
    },
    /// Add the dirty ranges of one bitmap to another
    BitmapMerge {
        /// Name of the export.
        export: String,
        /// Name of the bitmap that is changed.
        bitmap: String,
        /// Name of the bitmap that is read.
        from: String,
    },
    /// Freeze a bitmap, restart it empty, and export the disk as of that moment
    // Read-only, with the frozen bits as the bitmap's. The moment lies between two writes.
    CheckpointStart {
        /// Name of the export.
        export: String,
        /// The bitmap; without one, only the view is created.
        #[serde(default)]
        bitmap: Option<String>,
        /// Add the bitmap if it does not exist.
        #[serde(default)]
        if_missing: IfMissing,
        /// Name of the view's export [default: the export's name followed by .checkpoint].
        #[serde(default)]
        view: Option<String>,
        /// Restart an unreliable bitmap: for a full backup, which does not need the recorded
        /// changes.
        #[serde(default)]
        if_unusable: IfUnusable,
        /// UUID of the backup on which the new one builds: refused unless the bitmap started after
        /// it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        base: Option<String>,
        /// Continue if it is unknown after which backup the bitmap started.
        #[serde(default)]
        trust_base: bool,
        /// End of a checkpoint that no request ends.
        #[serde(default)]
        lifetime: Lifetime,
    },
    /// Start checkpoints of several exports at one moment
    CheckpointStartTogether {
        /// The checkpoints.
        checkpoints: Vec<TogetherCheckpoint>,
        /// End of checkpoints that no request ends.
        #[serde(default)]
        lifetime: Lifetime,
    },
    /// End a checkpoint: drop the frozen bits after a success, merge them back after a failure
    CheckpointEnd {
        /// Name of the export.
        export: String,
        /// Whether the backup succeeded.
        outcome: Outcome,
    },
    /// Copy into an image what the layers below it provide, and then drop these
    Stream {
        /// Name of the export.
        export: String,
        /// The layer that becomes the backing file; none without it. A relative name begins at the
        /// directory of the image.
        #[serde(default)]
        base: Option<String>,
        /// Bytes that are read per second; no limit without it.
        #[serde(default)]
        rate: Option<u64>,
        /// Start or end.
        #[serde(default)]
        action: StreamAction,
    },
    /// Requests, bytes, errors, latencies and queues of all exports and clients: a
    /// [`Status`](crate::status::Status)
    Statistics {},
    /// Read the configuration file again
    Reload {},
    /// Hand listeners, connections and images over to the program that asks
    // What follows the reply is the matter of the module `takeover`.
    Takeover {},
    /// Stop the server as SIGTERM does
    Shutdown {},
}

/// The treatment of clients of an export that is removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnUse {
    /// The export is kept.
    #[default]
    Refuse,
    /// Their connections are closed.
    Disconnect,
}

/// The initial state of a new bitmap.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InitialState {
    /// It records changes.
    #[default]
    Enabled,
    /// It does not record changes.
    Disabled,
}

/// The treatment of a missing bitmap.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IfMissing {
    /// The request fails.
    #[default]
    Fail,
    /// The bitmap is added, at the moment of the checkpoint.
    Add,
}

/// The treatment of an unreliable bitmap.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IfUnusable {
    /// The request fails.
    #[default]
    Fail,
    /// All ranges count as dirty before the checkpoint, and the bitmap restarts empty there.
    #[serde(alias = "begin-anew")]
    Restart,
}

/// The lifetime of a checkpoint that no request ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lifetime {
    /// It ends with the server.
    #[default]
    Server,
    /// It ends with the connection on which it was started: the client may be killed.
    Connection,
}

/// The outcome of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The backup is complete.
    Success,
    /// The backup failed.
    Failure,
}

/// What to do about a stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StreamAction {
    /// Start it. What an earlier one has copied is not copied again.
    #[default]
    Start,
    /// End it. What is copied stays.
    Cancel,
}

/// What a stream is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum StreamPhase {
    /// It copies.
    #[default]
    Running,
    /// A layer below cannot be read; it is tried again every few seconds.
    Paused,
    /// The layers are dropped, and their files closed.
    Complete,
    /// It was ended by a request.
    Cancelled,
    /// It has ended. The layers are as before.
    Failed,
}

impl StreamPhase {
    /// Whether it has ended.
    #[must_use]
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Complete | Self::Cancelled | Self::Failed)
    }
}

/// The stream into an export's image, or the last one. Sizes are in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct StreamState {
    /// What it is doing.
    pub phase: StreamPhase,
    /// Bytes of the disk that were looked at, and are in the image.
    pub done: u64,
    /// The size of the disk.
    pub total: u64,
    /// Why it is paused or has failed, a sentence.
    #[serde(default)]
    pub problem: Option<String>,
    /// Seconds since it has last copied something, or since its start, until it has ended: what it
    /// reads may hang.
    #[serde(default)]
    pub idle: Option<u64>,
}

/// The exports and the clients.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Listing {
    /// Start of the server, in seconds since 1970.
    #[serde(default)]
    pub since: Option<u64>,
    /// All exports, views of checkpoints included.
    pub exports: Vec<ExportState>,
    /// All clients that have selected an export.
    pub clients: Vec<ClientState>,
}

/// An export.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct ExportState {
    /// Its name; empty for the default export.
    pub name: String,
    /// Size, in bytes.
    pub size: u64,
    /// Whether all writes are refused.
    pub read_only: bool,
    /// Number of clients that have selected it.
    pub clients: usize,
    /// Time since which it is exported, in seconds since 1970.
    #[serde(default)]
    pub since: Option<u64>,
    /// The requests of all clients since then, those that have left included.
    #[serde(default)]
    pub traffic: Traffic,
    /// Source of the export; absent for views.
    pub source: Option<String>,
    /// Each with `name`, `granularity`, `enabled`, either `dirty-bytes` or `problem`, and the UUID
    /// of the backup that it `began-after`, or `perhaps-began-after` if another program has used
    /// the image.
    pub bitmaps: Vec<Value>,
    /// Why its bitmaps are not listed, if they are not, a sentence: what the disk is on may hang.
    #[serde(default)]
    pub problem: Option<String>,
    /// UUID of the disk; known since its first backup.
    #[serde(default)]
    pub disk: Option<String>,
    /// The checkpoint in progress: its `view`, its `bitmap`, and the `problem` if it is lost.
    pub checkpoint: Option<Value>,
    /// The stream into the image, or the last one.
    #[serde(default)]
    pub stream: Option<StreamState>,
}

/// A client that has selected an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct ClientState {
    /// Its unique number.
    pub id: u64,
    /// Its address, as text.
    pub peer: String,
    /// Its address, or that and the process and the user of a unix socket, as text.
    #[serde(default)]
    pub address: Option<String>,
    /// Name of its export.
    pub export: String,
    /// Time of the connection, in seconds since 1970.
    pub since: u64,
    /// Its requests.
    #[serde(default)]
    pub traffic: Traffic,
}

/// A checkpoint in progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct CheckpointStarted {
    /// Name of the view's export.
    pub view: String,
    /// The bitmap that provides the view's bits; none if it was just added.
    pub bitmap: Option<String>,
    /// The reason why the bitmap was unreliable, if it was restarted for that reason.
    #[serde(default, alias = "begun-anew")]
    pub restart_reason: Option<String>,
    /// UUID of the new backup: if the checkpoint ends with success, the bitmap started after it.
    #[serde(default)]
    pub backup: Option<String>,
    /// UUID of the disk, if it has one.
    #[serde(default)]
    pub disk: Option<String>,
    /// URIs of the view.
    pub uris: Vec<String>,
}

/// The kind of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request is malformed or contradictory.
    InvalidRequest,
    /// There is no export or bitmap of that name.
    NotFound,
    /// The name is in use.
    AlreadyExists,
    /// Clients, a checkpoint or another program use the object.
    InUse,
    /// Any other failure.
    Failed,
}

/// The failure of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Kind of the failure.
    pub kind: ErrorKind,
    /// A human-readable sentence.
    pub message: String,
}

impl Failure {
    /// Creates a failure; `message` is the whole sentence.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<imgfmt::Error> for Failure {
    fn from(error: imgfmt::Error) -> Self {
        Self::from(&error)
    }
}

impl From<&imgfmt::Error> for Failure {
    fn from(error: &imgfmt::Error) -> Self {
        let kind = match error.kind() {
            imgfmt::ErrorKind::NotFound => ErrorKind::NotFound,
            imgfmt::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
            imgfmt::ErrorKind::InvalidInput => ErrorKind::InvalidRequest,
            imgfmt::ErrorKind::Busy => ErrorKind::InUse,
            _ => ErrorKind::Failed,
        };
        Self::new(kind, error.to_string())
    }
}
