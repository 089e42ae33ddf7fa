//! The mode XTS (IEEE 1619), made of the library's AES in the mode ECB: block `n` of a sector is
//! encrypted between two additions of its tweak, which is the encrypted number of the sector,
//! multiplied by `x` in GF(2^128) `n` times.
//!
//! The library has this mode too, but starts every sector by a call that takes longer than the
//! sector itself, if that has 512 bytes. Here one call encrypts many sectors.

use openssl::cipher_ctx::CipherCtx;
use openssl::error::ErrorStack;
use zeroize::Zeroizing;

use super::block::{BLOCK, Direction, blocks};

/// How many bytes are processed at a time: whole sectors of all sizes, which stay in the first
/// cache together with their tweaks and the result.
const BATCH: usize = 8192;
/// The smallest sector, in bytes.
const SECTOR_MIN: usize = 512;
/// What the product of `x` and the highest power adds.
const OVERFLOW: u128 = 0x87;

/// The state of one thread.
pub(super) struct Xts {
    encrypt: CipherCtx,
    decrypt: CipherCtx,
    /// Encrypts the numbers of sectors.
    number: CipherCtx,
    /// Those of a batch, and then its first tweaks.
    numbers: Zeroizing<Vec<u8>>,
    tweaks: Zeroizing<Vec<u128>>,
    result: Zeroizing<Vec<u8>>,
}

impl Xts {
    /// The two keys are the halves of `key`.
    pub(super) fn new(key: &[u8]) -> Result<Self, ErrorStack> {
        let (data, number) = key.split_at(key.len() / 2);
        Ok(Self {
            encrypt: blocks(Direction::Encrypt, data)?,
            decrypt: blocks(Direction::Decrypt, data)?,
            number: blocks(Direction::Encrypt, number)?,
            // The library wants room for one block more.
            numbers: Zeroizing::new(vec![0; (BATCH / SECTOR_MIN + 1) * BLOCK]),
            tweaks: Zeroizing::new(vec![0; BATCH / BLOCK]),
            result: Zeroizing::new(vec![0; BATCH + BLOCK]),
        })
    }

    /// Encrypts or decrypts complete sectors in place; `number_of` makes the block that is
    /// encrypted for the next one.
    pub(super) fn apply(
        &mut self,
        direction: Direction,
        sector_size: usize,
        sectors: &mut [u8],
        mut next_number: impl FnMut() -> Result<[u8; BLOCK], ErrorStack>,
    ) -> Result<(), ErrorStack> {
        let batch = (BATCH / sector_size).max(1) * sector_size;
        for part in sectors.chunks_mut(batch) {
            let count = part.len() / sector_size;
            let (numbers, _) = self.numbers.as_chunks_mut();
            for number in &mut numbers[..count] {
                *number = next_number()?;
            }
            self.number.cipher_update_inplace(&mut self.numbers, count * BLOCK)?;
            self.multiply(sector_size, count);
            let (blocks, _) = part.as_chunks_mut();
            for (block, tweak) in blocks.iter_mut().zip(&*self.tweaks) {
                *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
            }
            let cipher = match direction {
                Direction::Encrypt => &mut self.encrypt,
                Direction::Decrypt => &mut self.decrypt,
            };
            cipher.cipher_update(part, Some(&mut self.result))?;
            let (blocks, _) = part.as_chunks_mut();
            let (results, _) = self.result.as_chunks();
            for ((block, result), tweak) in blocks.iter_mut().zip(results).zip(&*self.tweaks) {
                *block = (u128::from_le_bytes(*result) ^ tweak).to_le_bytes();
            }
        }
        Ok(())
    }

    /// Computes the tweaks of all blocks of sectors from the first ones.
    fn multiply(&mut self, sector_size: usize, count: usize) {
        let (first, _) = self.numbers.as_chunks();
        let sectors = self.tweaks.chunks_exact_mut(sector_size / BLOCK);
        for (first, tweaks) in first[..count].iter().zip(sectors) {
            let mut tweak = u128::from_le_bytes(*first);
            for place in tweaks {
                *place = tweak;
                let overflow = (tweak >> 127).wrapping_neg() & OVERFLOW;
                tweak = tweak << 1 ^ overflow;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use openssl::cipher::Cipher;

    use super::*;

    /// The same by the library.
    fn expected(direction: Direction, key: &[u8], first: u64, size: usize, data: &[u8]) -> Vec<u8> {
        let cipher = if key.len() == 32 { Cipher::aes_128_xts() } else { Cipher::aes_256_xts() };
        let mut all = Vec::new();
        for (number, sector) in (first..).zip(data.chunks(size)) {
            let mut vector = [0; BLOCK];
            vector[..8].copy_from_slice(&number.to_le_bytes());
            let mut context = CipherCtx::new().unwrap();
            match direction {
                Direction::Encrypt => {
                    context.encrypt_init(Some(cipher), Some(key), Some(&vector)).unwrap();
                }
                Direction::Decrypt => {
                    context.decrypt_init(Some(cipher), Some(key), Some(&vector)).unwrap();
                }
            }
            context.cipher_update_vec(sector, &mut all).unwrap();
        }
        all
    }

    #[test]
    fn every_length_is_encrypted_as_by_the_library() {
        for key_length in [32, 64] {
            let key: Vec<u8> = (0..key_length).map(|index| (index * 37 + 11) as u8).collect();
            let mut xts = Xts::new(&key).unwrap();
            for size in [512, 1024, 2048, 4096] {
                for count in [1, 2, 3, 15, 16, 17, 33, 128] {
                    let plain: Vec<u8> =
                        (0..size * count).map(|index| (index * index / 7) as u8).collect();
                    let first = u64::MAX / 3 + count as u64;
                    for direction in [Direction::Encrypt, Direction::Decrypt] {
                        let (mut found, mut number) = (plain.clone(), first);
                        let next = || {
                            let mut vector = [0; BLOCK];
                            vector[..8].copy_from_slice(&number.to_le_bytes());
                            number += 1;
                            Ok(vector)
                        };
                        xts.apply(direction, size, &mut found, next).unwrap();
                        let expected = expected(direction, &key, first, size, &plain);
                        assert!(found == expected, "{key_length} {size} {count} {direction:?}");
                    }
                }
            }
        }
    }

    /// Vectors 2 and 10 of the annex of IEEE 1619-2007: one sector of 32 bytes, which is enough for
    /// the product, and the begin of one of 512.
    #[test]
    fn the_standard_s_own_example_is_met() {
        let key = [[0x11; 16], [0x22; 16]].concat();
        let mut sector = [0x44; 32];
        let mut number = [0; BLOCK];
        number[..5].copy_from_slice(&[0x33; 5]);
        let mut xts = Xts::new(&key).unwrap();
        xts.apply(Direction::Encrypt, 32, &mut sector, || Ok(number)).unwrap();
        let expected = "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0";
        let found: String = sector.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(found, expected);
    }
}
