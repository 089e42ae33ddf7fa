//! The backup that an image is.

use imgfmt::Backup;
use serde::Serialize;

/// The identity of a backup. Identities are UUIDs. Not a key of qemu-img.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct BackupReport {
    /// This backup.
    pub id: String,
    /// The backup that it is based on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// The disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// Size of the disk in bytes; the image's is rounded up.
    pub disk_size: u64,
    /// Name of the export of the disk.
    pub export: String,
    /// Name of the bitmap of the changes since the base.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bitmap: Option<String>,
    /// Whether the file is unchanged since the backup.
    pub unchanged: bool,
}

impl From<&Backup> for BackupReport {
    fn from(backup: &Backup) -> Self {
        let identity = &backup.identity;
        Self {
            id: identity.id.to_string(),
            base: identity.base.id().map(|id| id.to_string()),
            disk: identity.disk.map(|id| id.to_string()),
            disk_size: identity.disk_size,
            export: identity.export.clone(),
            bitmap: identity.bitmap.clone(),
            unchanged: backup.is_unchanged,
        }
    }
}
