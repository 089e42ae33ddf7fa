//! The requests.

use serde::{Deserialize, Serialize};

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
