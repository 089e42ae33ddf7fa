//! The anti-forensic splitter (LUKS1 On-Disk Format Specification, section 2.4): a key is stored as
//! many stripes, all of which are needed to recover it.

use openssl::hash::{Hasher, MessageDigest};
use zeroize::{Zeroize as _, Zeroizing};

use super::error::library;
use crate::error::Result;

/// Number of stripes that `cryptsetup` and QEMU write. No header has more.
pub(super) const STRIPES: u32 = 4000;

/// Recovers a key of `length` bytes. `material` has at least one complete stripe, and no incomplete
/// one.
pub(super) fn merge(
    material: &[u8],
    length: usize,
    hash: MessageDigest,
) -> Result<Zeroizing<Vec<u8>>> {
    let mut key = Zeroizing::new(vec![0; length]);
    let mut stripes = material.chunks_exact(length).peekable();
    while let Some(stripe) = stripes.next() {
        xor(&mut key, stripe);
        if stripes.peek().is_some() {
            diffuse(&mut key, hash)?;
        }
    }
    Ok(key)
}

/// Replaces every block of the size of the hash by the hash of its number and itself.
fn diffuse(key: &mut [u8], hash: MessageDigest) -> Result<()> {
    for (number, block) in (0u32..).zip(key.chunks_mut(hash.size())) {
        let digest = Hasher::new(hash).and_then(|mut hasher| {
            hasher.update(&number.to_be_bytes())?;
            hasher.update(block)?;
            hasher.finish()
        });
        let mut digest = digest.map_err(|error| library(&error))?;
        let length = block.len();
        block.copy_from_slice(&digest[..length]);
        digest.zeroize();
    }
    Ok(())
}

fn xor(target: &mut [u8], with: &[u8]) {
    target.iter_mut().zip(with).for_each(|(target, with)| *target ^= with);
}
