//! The head of a backup: what it is of.

use serde::{Deserialize, Serialize};

use super::disks::{DiskHead, DiskOrigin};
use super::error::{RepositoryError, Result};

/// What a backup is. Unknown fields are ignored: what must be understood changes the version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Head {
    /// The name of the disk.
    pub name: String,
    /// Size of the disk, in bytes.
    pub size: u64,
    /// When the backup was begun, in milliseconds since 1970; of an imported one, when its image
    /// was written last.
    pub time: u64,
    /// Where the disk comes from, if it has only one.
    #[serde(flatten)]
    pub origin: DiskOrigin,
    /// What an imported image was, so that it is not imported again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imported: Option<String>,
    /// The disks, if it has several. Then `size` is where the last one ends, and what is recorded
    /// of one disk is with them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskHead>,
    /// Bytes of the disk that are not zero, in whole blocks.
    pub data: u64,
    /// Bytes that this backup added to the repository.
    pub added: u64,
    /// Length of the body before compression, in bytes.
    pub body_length: u64,
    /// Hash of the body, as 32 hexadecimal digits.
    pub body_hash: String,
    /// The id of the backup, where it is stored: without a passphrase, nothing else would tell that
    /// two objects were exchanged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
}

impl Head {
    /// Bytes of its disks.
    pub fn bytes(&self) -> u64 {
        match self.disks.is_empty() {
            true => self.size,
            false => self.disks.iter().fold(0, |sum, disk| disk.size.saturating_add(sum)),
        }
    }

    /// Returns what the backup is of one disk: of that of this name, if it has several. Its name is
    /// then `NAME#DISK`, and it has only this disk.
    ///
    /// # Errors
    ///
    /// If it has no such disk, or several and no name is given; the error says which there are.
    pub fn of_disk(&self, name: Option<&str>) -> Result<Self> {
        if name.is_none() && self.disks.is_empty() {
            return Ok(self.clone());
        }
        let has: Vec<_> = self.disks.iter().take(8).map(|disk| &*disk.name).collect();
        let found = name.and_then(|name| self.disks.iter().find(|disk| disk.name == name));
        let Some(disk) = found else {
            return Err(RepositoryError::invalid(match (&has[..], name) {
                ([], _) => format!("the backup of '{}' is of one disk, without a name", self.name),
                ([first, ..], None) => format!(
                    "the backup of '{0}' has named disks ({1}); name one, as in {0}@latest#{first}",
                    self.name,
                    has.join(", "),
                ),
                (_, Some(name)) => format!(
                    "the backup of '{}' has no disk '{name}' (it has {})",
                    self.name,
                    has.join(", ")
                ),
            }));
        };
        Ok(Self {
            name: format!("{}#{}", self.name, disk.name),
            size: disk.size,
            origin: disk.origin.clone(),
            disks: vec![disk.clone()],
            ..self.clone()
        })
    }

    /// Describes the place of a byte of the map.
    pub(crate) fn place(&self, byte: u64) -> String {
        match self.disks.iter().rfind(|disk| disk.offset <= byte) {
            Some(disk) => format!("byte {} of its disk '{}'", byte - disk.offset, disk.name),
            None => format!("byte {byte}"),
        }
    }

    /// The version of the object.
    pub(crate) fn version(&self) -> u8 {
        if self.disks.is_empty() { 1 } else { 2 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Heads that other programs have written are read, and they read those of this one.
    #[test]
    fn heads_have_the_form_of_the_description() {
        let (before, after) =
            (r#"{"name":"vm1","size":33554332,"time":1"#, r#""data":5,"added":6"#);
        let origin = r#","identity":"i","disk":"d","export":"e","bitmap":"b""#;
        let end = r#","body-length":7,"body-hash":"h"}"#;
        let single = format!("{before}{origin},{after}{end}");
        let disk = format!(r#"{{"name":"a","offset":0,"size":33554332{origin}}}"#);
        let several = format!(r#"{before},"disks":[{disk}],{after}{end}"#);
        let all = DiskOrigin {
            identity: Some("i".to_owned()),
            disk: Some("d".to_owned()),
            export: Some("e".to_owned()),
            bitmap: Some("b".to_owned()),
        };
        for (text, disks) in [(single, 0), (several, 1)] {
            let head: Head = serde_json::from_str(&text).unwrap();
            let origin = head.disks.first().map_or(&head.origin, |disk| &disk.origin);
            assert_eq!((head.disks.len(), origin), (disks, &all));
            assert_eq!(serde_json::to_string(&head).unwrap(), text);
        }
        let least = format!(r#"{before},{after}{end}"#);
        let head: Head = serde_json::from_str(&least).unwrap();
        assert_eq!(head.origin, DiskOrigin::default());
        assert_eq!(serde_json::to_string(&head).unwrap(), least);
    }
}
