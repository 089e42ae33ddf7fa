//! Hides the sums of backups. They are in a header that is not encrypted, and would let everybody
//! who has the file try guesses at the content of the disk.

use std::sync::Arc;

use super::cipher::SectorCipher;
use super::luks::Volume;
use crate::error::Result;

/// The key of a volume, from which masks for sums are derived.
#[derive(Debug)]
pub(crate) struct SumKey(Arc<SectorCipher>);

impl SumKey {
    pub(crate) fn of(volume: &Volume) -> Self {
        Self(Arc::clone(&volume.cipher))
    }

    /// The mask for the sum of the backup with this identity. Each backup has an image of its own,
    /// with a random key and one sum.
    pub(crate) fn mask(&self, backup: [u8; 16]) -> Result<[u8; 32]> {
        self.0.derive(&[&b"nbd-cli: sum of the backup "[..], &backup].concat())
    }
}
