//! The record of a session: who makes which backup, or a compaction.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::error::{RepositoryError, Result};
use super::id::Id;
use super::reader::Reader;
use super::seal::{FramePlace, SESSION, Sealer};
use super::stored::push;

const MAGIC: &[u8; 8] = b"nbdsess1";
/// Longest record, in bytes.
const RECORD_LEN_MAX: usize = 16 << 10;

/// Who makes which backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SessionRecord {
    /// The name of the disk; of a compaction one that no disk has.
    pub name: String,
    /// The machine.
    pub host: String,
    /// When it began, in milliseconds since 1970.
    pub time: u64,
    /// Whether it failed: it will not be committed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub failed: bool,
}

/// The name in the record of a compaction. No backup has this name.
const COMPACTION: &str = "@compact";

impl SessionRecord {
    /// The record of a compaction.
    pub(crate) fn of_compaction(host: String, time: u64) -> Self {
        Self { name: COMPACTION.to_owned(), host, time, failed: false }
    }

    /// Returns whether this is a compaction, and not a backup.
    pub fn is_compaction(&self) -> bool {
        self.name == COMPACTION
    }

    /// Encodes the record; `counter` grows with each renewal.
    pub(crate) fn encode(&self, sealer: &Sealer, id: Id, counter: u32) -> Result<Bytes> {
        let text = serde_json::to_vec(self);
        let text = text.map_err(|error| RepositoryError::invalid(format!("no JSON: {error}")))?;
        if text.len() > RECORD_LEN_MAX {
            return Err(RepositoryError::invalid("the name of the disk is too long"));
        }
        let mut object = MAGIC.to_vec();
        push(&mut object, counter as usize);
        object.extend_from_slice(&sealer.frame(place(id, counter), &text)?);
        Ok(object.into())
    }

    /// Decodes a record, and its counter.
    pub(crate) fn decode(sealer: &Sealer, id: Id, object: &[u8]) -> Option<(Self, u32)> {
        let mut reader = Reader(object.strip_prefix(MAGIC)?);
        let counter = reader.u32()?;
        let text = sealer.open_unknown(place(id, counter), reader.0, RECORD_LEN_MAX).ok()?;
        Some((serde_json::from_slice(&text).ok()?, counter))
    }
}

fn place(session: Id, counter: u32) -> FramePlace {
    FramePlace { session, number: SESSION, offset: counter }
}
