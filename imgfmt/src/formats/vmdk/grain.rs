//! Compressed grains: each is a zlib stream, after a marker that says which grain it is.
//!
//! | offset | size | field, little-endian |
//! | ---: | ---: | --- |
//! | 0 | 8 | sector of the extent that the grain starts with |
//! | 8 | 4 | length of the stream in bytes |
//! | 12 | | the stream (RFC 1950) |

use std::sync::Arc;

use super::descriptor::SECTOR;
use super::sparse::{MARKER_LENGTH, Sparse};
use crate::bytes::{u32_le_at, u64_le_at};
use crate::decompression;
use crate::error::Result;
use crate::mapping::Encoded;
use crate::ordered_lock::{OrderedRwLock, rank};

/// How many bytes of grains are kept, and most grains.
const BYTES_MAX: u64 = 4 << 20;
const KEPT_MAX: u64 = 16;

/// A grain and its offset on the disk.
type Grain = (u64, Arc<[u8]>);

/// Grains that were read lately.
#[derive(Debug)]
pub(super) struct Grains(Box<[OrderedRwLock<{ rank::FOREIGN_DECODED }, Option<Grain>>]>);

impl Grains {
    /// For grains of up to `largest` bytes.
    pub(super) fn new(largest: u64) -> Self {
        let count = (BYTES_MAX / largest.max(1)).clamp(1, KEPT_MAX);
        Self((0..count).map(|_| OrderedRwLock::new(None)).collect())
    }

    /// Fills a buffer with a part of a grain: from `offset` of its extent on, which is `guest` on
    /// the disk.
    pub(super) fn read(
        &self,
        sparse: &Sparse,
        encoded: Encoded,
        (offset, guest): (u64, u64),
        buffer: &mut [u8],
    ) -> Result<()> {
        let inside = offset % sparse.grain;
        let (first, first_guest) = (offset - inside, guest - inside);
        let slot = &self.0[(offset / sparse.grain % self.0.len() as u64) as usize];
        let kept = match &*slot.read() {
            Some((kept, grain)) if *kept == first_guest => Some(Arc::clone(grain)),
            _ => None,
        };
        let grain = match kept {
            Some(grain) => grain,
            None => {
                let grain = decompressed(sparse, encoded, first, guest)?;
                *slot.write() = Some((first_guest, Arc::clone(&grain)));
                grain
            }
        };
        let inside = inside as usize;
        // The last grain may be as long as the rest of the disk.
        let Some(bytes) = grain.get(inside..inside + buffer.len()) else {
            return Err(sparse.file.corrupt("a compressed grain is too short", guest));
        };
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

/// Reads the whole grain that starts at `first` of its extent.
fn decompressed(sparse: &Sparse, encoded: Encoded, first: u64, guest: u64) -> Result<Arc<[u8]>> {
    let corrupt = |detail| Err(sparse.file.corrupt(detail, guest));
    let mut input = vec![0; encoded.length as usize];
    let read = sparse.file.storage().read_at(encoded.offset, &mut input);
    let read = read.map_err(|error| sparse.file.io("read", error, guest))?;
    let mut stream = &input[..read];
    if sparse.has_markers() {
        if u64_le_at(stream, 0).checked_mul(SECTOR) != Some(first) {
            return corrupt("the marker of a compressed grain is that of another one");
        }
        let length = u32_le_at(stream, 8) as usize;
        match stream.get(MARKER_LENGTH..).and_then(|rest| rest.get(..length)) {
            Some(marked) if length > 0 => stream = marked,
            _ => return corrupt("the marker of a compressed grain has a length that cannot be"),
        }
    }
    let mut grain = vec![0; sparse.grain as usize];
    let mut inflater = flate2::Decompress::new(true);
    let _begun = decompression::begin();
    let finished = inflater.decompress(stream, &mut grain, flate2::FlushDecompress::Finish);
    if !matches!(finished, Ok(flate2::Status::StreamEnd)) {
        return corrupt("a compressed grain is damaged");
    }
    grain.truncate(inflater.total_out() as usize);
    Ok(grain.into())
}
