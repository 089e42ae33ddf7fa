//! The anti-forensic splitter (LUKS1 On-Disk Format Specification, section 2.4): a key is stored as
//! many stripes, all of which are needed to recover it.

use openssl::hash::{Hasher, MessageDigest};
use openssl::rand::rand_priv_bytes;
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

/// Splits a key into `stripes` stripes, the inverse of [`merge`].
pub(super) fn split(key: &[u8], stripes: usize, hash: MessageDigest) -> Result<Zeroizing<Vec<u8>>> {
    let mut material = Zeroizing::new(vec![0; key.len() * stripes]);
    let mut sum = Zeroizing::new(vec![0; key.len()]);
    let (random, last) = material.split_at_mut(key.len() * stripes.saturating_sub(1));
    rand_priv_bytes(random).map_err(|error| library(&error))?;
    for stripe in random.chunks_exact(key.len()) {
        xor(&mut sum, stripe);
        diffuse(&mut sum, hash)?;
    }
    last.copy_from_slice(key);
    xor(last, &sum);
    Ok(material)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_key_is_recovered_from_all_of_its_stripes_only() {
        for (length, stripes, hash) in [(64, 4000, "sha256"), (32, 3, "sha1"), (16, 1, "sha512")] {
            let key: Vec<u8> = (0..length).map(|index| index as u8).collect();
            let hash = MessageDigest::from_name(hash).unwrap();
            let mut material = split(&key, stripes, hash).unwrap();
            assert!(*merge(&material, length, hash).unwrap() == key);
            material[0] ^= 1;
            assert!(*merge(&material, length, hash).unwrap() != key);
        }
    }
}
