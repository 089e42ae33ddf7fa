//! The content of a pin: which backup is read, and by whom.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::error::{RepositoryError, Result};
use super::id::Id;
use super::seal::{FramePlace, PIN, Sealer};
use crate::crypto::{from_hex, hex};

/// Longest description of a reader, in bytes.
const READER_LEN_MAX: usize = 4 << 10;

/// Who reads a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReaderInfo {
    /// The machine.
    pub host: String,
    /// The number of its process there.
    pub process: u32,
    /// When it began, in milliseconds since 1970.
    pub time: u64,
}

impl ReaderInfo {
    /// This process, now.
    pub(crate) fn own() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        Self { host: host_name(), process: std::process::id(), time }
    }
}

/// The name of this machine.
#[must_use]
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Encodes a pin. Call it once for each: it seals the reader.
pub(crate) fn encode(sealer: &Sealer, pin: Id, backup: Id, reader: &ReaderInfo) -> Result<Bytes> {
    let failed = |error| RepositoryError::invalid(format!("no JSON: {error}"));
    let reader = serde_json::to_vec(reader).map_err(failed)?;
    let reader = hex(&sealer.frame(place(pin), &reader)?);
    Ok(format!("{{\"backup\":\"{backup}\",\"reader\":\"{reader}\"}}").into())
}

/// Decodes a pin: the backup, and its reader, if that is known.
pub(crate) fn decode(sealer: &Sealer, pin: Id, object: &[u8]) -> Option<(Id, Option<ReaderInfo>)> {
    let mut content: serde_json::Value = serde_json::from_slice(object).ok()?;
    let backup = content["backup"].as_str()?.parse().ok()?;
    let reader = content["reader"].take();
    let reader = reader.as_str().and_then(from_hex).and_then(|frame| {
        let text = sealer.open_unknown(place(pin), &frame, READER_LEN_MAX).ok()?;
        serde_json::from_slice(&text).ok()
    });
    Some((backup, reader))
}

fn place(pin: Id) -> FramePlace {
    FramePlace { session: pin, number: PIN, offset: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_read_with_or_without_their_reader() {
        let (pin, backup) = (Id::from_bytes([1; 16]), Id::from_bytes([2; 16]));
        for sealer in [Sealer::default(), Sealer::encrypting(&[7; 32])] {
            let own = ReaderInfo::own();
            let object = encode(&sealer, pin, backup, &own).unwrap();
            assert_eq!(decode(&sealer, pin, &object), Some((backup, Some(own.clone()))));
            let text = String::from_utf8(object.to_vec()).unwrap();
            assert!(!text.contains("host"), "the reader is sealed: {text}");
            // What older versions read and write.
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(value["backup"], backup.to_string());
            let old = format!("{{\"backup\":\"{backup}\"}}");
            assert_eq!(decode(&sealer, pin, old.as_bytes()), Some((backup, None)));
            // A reader that is damaged is unknown; the backup is kept all the same.
            for reader in ["\"00ff\"", "\"x\"", "7", "{}", "null"] {
                let bad = format!("{{\"backup\":\"{backup}\",\"reader\":{reader}}}");
                assert_eq!(decode(&sealer, pin, bad.as_bytes()), Some((backup, None)), "{bad}");
            }
            assert_eq!(decode(&sealer, pin, b"{\"backup\":\"no\"}"), None);
        }
    }
}
