//! The header of an image that is not complete yet.
//!
//! It replaces the final header while the image is written. QEMU and this crate refuse it because
//! of an incompatible feature bit that QEMU does not know. The table of features contains a name
//! for the bit, so that QEMU's message explains the reason.

use super::extension;
use super::header::{MAGIC, V3_LENGTH_MIN, field, incompatible};

const SECTOR: usize = 512;
const CLUSTER_BITS: u32 = 16;
/// At most 46 bytes.
const NAME: &[u8] = b"incomplete: its writer was interrupted";

/// The first sector of an incomplete disk.
pub(crate) fn incomplete_header() -> [u8; SECTOR] {
    let mut header = [0; SECTOR];
    let mut put = |at: u64, bytes: &[u8]| {
        header[at as usize..][..bytes.len()].copy_from_slice(bytes);
    };
    put(0, &MAGIC);
    put(4, &3_u32.to_be_bytes());
    put(20, &CLUSTER_BITS.to_be_bytes());
    put(field::INCOMPATIBLE, &incompatible::INCOMPLETE.to_be_bytes());
    put(96, &4_u32.to_be_bytes()); // refcounts of 16 bits
    put(100, &(V3_LENGTH_MIN as u32).to_be_bytes());
    let mut name = vec![0, incompatible::INCOMPLETE.trailing_zeros() as u8];
    name.extend(NAME);
    name.resize(48, 0);
    let mut extensions = Vec::new();
    extension::push(&mut extensions, extension::FEATURE_NAMES, &name);
    put(V3_LENGTH_MIN, &extensions);
    header
}
