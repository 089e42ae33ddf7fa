//! What the replies say.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::control::traffic::Traffic;

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
