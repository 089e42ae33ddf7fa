//! The location of the sidecar, and the properties by which it is recognised.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::directory::Entry;
use super::store::Bitmaps;
use crate::bitmap::Bitmap;
use crate::bytes::u64_at;
use crate::error::{Error, ErrorKind, Result};
use crate::sidecar::{BitmapDescriptor, Fingerprint, Identity, SidecarLocation, SidecarPlace};
use crate::units::HostOffset;

impl Bitmaps {
    pub(super) fn sidecar_place(&self) -> Result<Arc<dyn SidecarLocation>> {
        if let Some(home) = &self.sidecar_location {
            return Ok(Arc::clone(home));
        }
        let path = self.metadata.path().ok_or_else(no_file)?;
        let place = SidecarPlace::beside(path).map_err(sidecar_error)?;
        Ok(Arc::new(place))
    }

    pub(super) fn descriptor(&self, bitmap: &Bitmap<Entry>) -> BitmapDescriptor {
        BitmapDescriptor {
            name: bitmap.stored.name.clone(),
            granularity_bits: bitmap.granularity_bits,
            bit_count: self.size.div_ceil(1 << bitmap.granularity_bits.min(63)),
        }
    }

    /// The fingerprint of the image's file; `None` if it is not a regular file.
    pub(super) fn fingerprint(&self) -> Option<Fingerprint> {
        let inode = self.metadata.file.identity()?.inode;
        let length = self.metadata.file.len().ok()?;
        let modified = self.metadata.file.as_fd().map_or(Some(0), modification_time)?;
        let mut header = [0; 112];
        self.metadata.file.read_exact_at(HostOffset::new(0), &mut header).ok()?;
        // Magic, version; cluster_bits; crypt_method; refcount_order and header_length.
        let fixed = [0..8, 20..24, 32..36, 96..104];
        let fixed: Vec<u8> = fixed.into_iter().flat_map(|part| header[part].to_vec()).collect();
        (inode != 0).then(|| Fingerprint {
            inode,
            length,
            modified,
            header_crc: crc32fast::hash(&fixed),
        })
    }
}

/// Nanoseconds since 1970.
fn modification_time(file: BorrowedFd<'_>) -> Option<u64> {
    let status = rustix::fs::fstat(file).ok()?;
    let seconds = u64::try_from(status.st_mtime).unwrap_or(0);
    Some(seconds.saturating_mul(1_000_000_000).saturating_add(status.st_mtime_nsec as u64))
}

pub(super) fn encode_identity(identity: Identity) -> Vec<u8> {
    [&identity.uuid[..], &identity.generation.to_be_bytes()].concat()
}

pub(super) fn decode_identity(content: &[u8]) -> Option<Identity> {
    let uuid = content.get(..16)?.try_into().ok()?;
    (content.len() == 24).then(|| Identity { uuid, generation: u64_at(content, 16) })
}

pub(super) fn no_file() -> Error {
    let detail = "the image is not an ordinary file, or its bitmaps are too large for that";
    Error::new(ErrorKind::Unsupported, KEEP, detail)
}

pub(super) fn sidecar_error(error: std::io::Error) -> Error {
    Error::from_io(KEEP, error)
}

const KEEP: &str = "keep the bits of bitmaps beside";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_extension_holds_uuid_and_generation_and_nothing_else() {
        let identity = Identity { uuid: *b"0123456789abcdef", generation: 0x0102 };
        let content = encode_identity(identity);
        assert_eq!(content[16..], [0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(decode_identity(&content), Some(identity));
        for length in 0..24 {
            assert_eq!(decode_identity(&content[..length]), None);
        }
        assert_eq!(decode_identity(&[0; 32]), None);
    }
}
