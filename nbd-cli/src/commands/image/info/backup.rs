//! The backup in the output of `image info`.

use imgfmt::Backup;
use serde::Serialize;

use crate::output::printable;

/// The identity of a backup; as UUIDs.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct JsonBackup<'a> {
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disk: Option<String>,
    /// In bytes; the image's is rounded up.
    disk_size: u64,
    export: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmap: Option<&'a str>,
    /// The file is unchanged since the backup.
    unchanged: bool,
}

impl<'a> From<&'a Backup> for JsonBackup<'a> {
    fn from(backup: &'a Backup) -> Self {
        let identity = &backup.identity;
        Self {
            id: identity.id.to_string(),
            base: identity.base.id().map(|id| id.to_string()),
            disk: identity.disk.map(|id| id.to_string()),
            disk_size: identity.disk_size,
            export: &identity.export,
            bitmap: identity.bitmap.as_deref(),
            unchanged: backup.is_unchanged,
        }
    }
}

/// The same as text.
pub(super) fn text(backup: &Backup) -> String {
    let identity = &backup.identity;
    let mut parts = vec![identity.id.to_string(), format!("of '{}'", printable(&identity.export))];
    if let Some(base) = identity.base.id() {
        parts.push(format!("upon {base}"));
    }
    if !backup.is_unchanged {
        parts.push("changed since".to_owned());
    }
    parts.join(", ")
}
