//! Ciphers that encrypt every sector on its own: AES in the modes XTS and CBC, with the generators
//! of initialisation vectors that `cryptsetup` and QEMU use for it.

use std::fmt;

use openssl::cipher::{Cipher, CipherRef};
use openssl::cipher_ctx::CipherCtx;
use openssl::error::ErrorStack;
use zeroize::{Zeroize as _, Zeroizing};

pub(super) use super::block::Direction;
use super::block::{BLOCK, blocks, ecb};
use super::error::{invalid, library, unsupported};
use super::hash;
use super::xts::Xts;
use crate::error::Result;
use crate::ordered_lock::{OrderedMutex, rank};

/// Vectors count units of this size, whatever the size of a sector is.
const IV_UNIT: u64 = 512;
/// Contexts that are kept for later. More threads than these make their own.
const IDLE_MAX: usize = 64;

/// The keys of a volume, ready for use by all threads.
pub(super) struct SectorCipher {
    mode: Mode,
    vectors: Vectors,
    key: Zeroizing<Vec<u8>>,
    /// The key that encrypts the numbers of sectors.
    essiv_key: Option<Zeroizing<Vec<u8>>>,
    idle: OrderedMutex<{ rank::CIPHER_CONTEXTS }, Vec<Context>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Xts,
    Cbc,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vectors {
    /// The number of the sector in 32 bits.
    Plain,
    /// The number of the sector in 64 bits.
    Plain64,
    /// The encrypted number of the sector.
    Essiv,
}

/// State that one thread uses at a time.
struct Context {
    chaining: Chaining,
    essiv: Option<CipherCtx>,
}

enum Chaining {
    Xts(Xts),
    Cbc(Cbc),
}

struct Cbc {
    encrypt: CipherCtx,
    decrypt: CipherCtx,
    /// Where a sector is put.
    scratch: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mode, vectors, .. } = self;
        f.debug_struct("SectorCipher")
            .field("mode", mode)
            .field("vectors", vectors)
            .finish_non_exhaustive()
    }
}

impl SectorCipher {
    /// The cipher of that name and mode, such as `aes` and `xts-plain64`.
    pub(super) fn new(name: &str, mode: &str, key: Zeroizing<Vec<u8>>) -> Result<Self> {
        let shown = format!("{}-{}", name.escape_debug(), mode.escape_debug());
        let refused = |what: &str| {
            unsupported(format!("its cipher is '{shown}', and {what} is not supported"))
        };
        if name != "aes" {
            return Err(refused(&format!("'{}'", name.escape_debug())));
        }
        let (chaining, generator) = mode.split_once('-').unwrap_or((mode, ""));
        let mode = match chaining {
            "xts" => Mode::Xts,
            "cbc" => Mode::Cbc,
            _ => return Err(refused("this mode")),
        };
        let (generator, hash) = match generator.split_once(':') {
            Some((generator, name)) => (generator, Some(hash::by_name(name)?)),
            None => (generator, None),
        };
        let (vectors, essiv_key) = match (generator, hash) {
            // QEMU records a hash here if its user names one (`ivgen-hash-alg`, as OpenStack does).
            // It has no use, and QEMU and the kernel ignore it as well.
            ("plain", _) => (Vectors::Plain, None),
            ("plain64", _) => (Vectors::Plain64, None),
            ("essiv", Some(hash)) => {
                let mut digest =
                    openssl::hash::hash(hash, &key).map_err(|error| library(&error))?;
                let essiv_key = Zeroizing::new(digest.to_vec());
                digest.zeroize();
                (Vectors::Essiv, Some(essiv_key))
            }
            _ => return Err(refused("this generator of initialisation vectors")),
        };
        let cipher = Self { mode, vectors, key, essiv_key, idle: OrderedMutex::default() };
        if cipher.bulk().is_none() {
            let bits = cipher.key.len() * 8;
            return Err(refused(&format!("a key of {bits} bits")));
        }
        if cipher.essiv_key.as_deref().is_some_and(|key| ecb(key.len()).is_none()) {
            return Err(refused("this hash for initialisation vectors"));
        }
        // Shows now what the library refuses, such as an XTS key of two equal halves.
        let mut bulk = CipherCtx::new().map_err(|error| library(&error))?;
        bulk.encrypt_init(cipher.bulk(), Some(&cipher.key), Some(&[0; BLOCK]))
            .map_err(|error| library(&error))?;
        let context = cipher.new_context().map_err(|error| library(&error))?;
        cipher.idle.lock().push(context);
        Ok(cipher)
    }

    /// Derives 32 bytes from the key, which say nothing of it: HMAC-SHA-256 of a label, which is
    /// PBKDF2 with one iteration.
    pub(super) fn derive(&self, label: &[u8]) -> Result<[u8; 32]> {
        let (sha256, mut derived) = (openssl::hash::MessageDigest::sha256(), [0; 32]);
        openssl::pkcs5::pbkdf2_hmac(&self.key, label, 1, sha256, &mut derived)
            .map_err(|error| library(&error))?;
        Ok(derived)
    }

    /// Whether a sector that is written by two threads at once may have blocks that neither wrote:
    /// in CBC the decryption of a block needs the one before it.
    pub(super) fn blocks_depend(&self) -> bool {
        self.mode == Mode::Cbc
    }

    /// Encrypts or decrypts complete sectors in place. `first` is the number of the first one, in
    /// units of 512 bytes; numbers wrap around.
    pub(super) fn apply(
        &self,
        direction: Direction,
        first: u64,
        sector_size: usize,
        sectors: &mut [u8],
    ) -> Result<()> {
        if !sectors.len().is_multiple_of(sector_size) {
            return Err(invalid("its encrypted data does not consist of complete sectors"));
        }
        let kept = self.idle.lock().pop();
        let applied = kept.map_or_else(|| self.new_context(), Ok).and_then(|mut context| {
            let mut number = first;
            let next = || {
                let vector = self.vector(context.essiv.as_mut(), number);
                number = number.wrapping_add(sector_size as u64 / IV_UNIT);
                vector
            };
            match &mut context.chaining {
                Chaining::Xts(xts) => xts.apply(direction, sector_size, sectors, next)?,
                Chaining::Cbc(cbc) => cbc.apply(direction, sector_size, sectors, next)?,
            }
            Ok(context)
        });
        let context = applied.map_err(|error| library(&error))?;
        let mut idle = self.idle.lock();
        if idle.len() < IDLE_MAX {
            idle.push(context);
        }
        Ok(())
    }

    fn vector(
        &self,
        essiv: Option<&mut CipherCtx>,
        number: u64,
    ) -> Result<[u8; BLOCK], ErrorStack> {
        let mut vector = [0; BLOCK];
        match self.vectors {
            Vectors::Plain => vector[..4].copy_from_slice(&(number as u32).to_le_bytes()),
            Vectors::Plain64 | Vectors::Essiv => vector[..8].copy_from_slice(&number.to_le_bytes()),
        }
        if let Some(essiv) = essiv {
            let mut encrypted = [0; 2 * BLOCK];
            essiv.cipher_update(&vector, Some(&mut encrypted))?;
            vector.copy_from_slice(&encrypted[..BLOCK]);
        }
        Ok(vector)
    }

    fn new_context(&self) -> Result<Context, ErrorStack> {
        let chaining = match self.mode {
            Mode::Xts => Chaining::Xts(Xts::new(&self.key)?),
            Mode::Cbc => Chaining::Cbc(Cbc::new(self.bulk(), &self.key)?),
        };
        let essiv = self.essiv_key.as_ref().map(|key| blocks(Direction::Encrypt, key));
        Ok(Context { chaining, essiv: essiv.transpose()? })
    }

    /// The library's cipher.
    fn bulk(&self) -> Option<&'static CipherRef> {
        match (self.mode, self.key.len()) {
            (Mode::Xts, 32) => Some(Cipher::aes_128_xts()),
            (Mode::Xts, 64) => Some(Cipher::aes_256_xts()),
            (Mode::Cbc, 16) => Some(Cipher::aes_128_cbc()),
            (Mode::Cbc, 24) => Some(Cipher::aes_192_cbc()),
            (Mode::Cbc, 32) => Some(Cipher::aes_256_cbc()),
            _ => None,
        }
    }
}

impl Cbc {
    fn new(cipher: Option<&CipherRef>, key: &[u8]) -> Result<Self, ErrorStack> {
        let mut contexts = [CipherCtx::new()?, CipherCtx::new()?];
        contexts[0].encrypt_init(cipher, Some(key), Some(&[0; BLOCK]))?;
        contexts[1].decrypt_init(cipher, Some(key), Some(&[0; BLOCK]))?;
        contexts.iter_mut().for_each(|context| context.set_padding(false));
        let [encrypt, decrypt] = contexts;
        Ok(Self { encrypt, decrypt, scratch: Zeroizing::default() })
    }

    /// As [`Xts::apply`].
    fn apply(
        &mut self,
        direction: Direction,
        sector_size: usize,
        sectors: &mut [u8],
        mut next_vector: impl FnMut() -> Result<[u8; BLOCK], ErrorStack>,
    ) -> Result<(), ErrorStack> {
        // The library wants room for one block more.
        self.scratch.resize(sector_size + BLOCK, 0);
        for sector in sectors.chunks_exact_mut(sector_size) {
            let vector = next_vector()?;
            let cipher = match direction {
                Direction::Encrypt => {
                    self.encrypt.encrypt_init(None, None, Some(&vector))?;
                    &mut self.encrypt
                }
                Direction::Decrypt => {
                    self.decrypt.decrypt_init(None, None, Some(&vector))?;
                    &mut self.decrypt
                }
            };
            cipher.cipher_update(sector, Some(&mut self.scratch))?;
            sector.copy_from_slice(&self.scratch[..sector.len()]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cipher(mode: &str, key: usize) -> Result<SectorCipher> {
        let key = (0..key).map(|index| index as u8).collect();
        SectorCipher::new("aes", mode, Zeroizing::new(key))
    }

    #[test]
    fn every_sector_is_encrypted_by_its_own_number() {
        let modes = [
            ("xts-plain64", 64),
            ("xts-plain64", 32),
            ("xts-plain", 64),
            ("cbc-essiv:sha256", 32),
            ("cbc-essiv:sha256", 16),
            ("cbc-plain64", 24),
        ];
        for (mode, key) in modes {
            let cipher = cipher(mode, key).unwrap();
            for size in [512, 4096] {
                let mut both = vec![7; 2 * size];
                cipher.apply(Direction::Encrypt, 6, size, &mut both).unwrap();
                let (one, two) = both.split_at(size);
                assert!(one != two && one != vec![7; size], "{mode}");
                let mut second = vec![7; size];
                cipher.apply(Direction::Encrypt, 6 + size as u64 / 512, size, &mut second).unwrap();
                assert!(second == two, "{mode}");
                cipher.apply(Direction::Decrypt, 6, size, &mut both).unwrap();
                assert!(both.iter().all(|byte| *byte == 7), "{mode}");
            }
        }
    }

    #[test]
    fn numbers_of_plain_have_32_bits_and_others_64() {
        let encrypt = |mode, number| {
            let mut sector = vec![7; 512];
            cipher(mode, 64).unwrap().apply(Direction::Encrypt, number, 512, &mut sector).unwrap();
            sector
        };
        assert!(encrypt("xts-plain", 1) == encrypt("xts-plain", 1 | 1 << 32));
        assert!(encrypt("xts-plain64", 1) != encrypt("xts-plain64", 1 | 1 << 32));
        assert!(encrypt("xts-plain64", 1) == encrypt("xts-plain64:sha256", 1));
    }

    #[test]
    fn other_ciphers_are_refused_by_name() {
        for (name, mode, key) in [
            ("serpent", "xts-plain64", 64),
            ("aes", "ecb", 32),
            ("aes", "xts-plain64", 48),
            ("aes", "xts-random", 64),
            ("aes", "cbc-essiv", 32),
            ("aes", "cbc-essiv:sha512", 32),
            ("aes", "cbc-plain64:md9", 32),
            ("", "", 0),
        ] {
            let key = Zeroizing::new((0..key).map(|index| index as u8).collect());
            let error = SectorCipher::new(name, mode, key).unwrap_err().to_string();
            assert!(error.contains("not supported"), "{error}");
        }
    }

    #[test]
    fn keys_are_not_shown() {
        let shown = format!("{:?}", cipher("xts-plain64", 64).unwrap());
        assert_eq!(shown, "SectorCipher { mode: Xts, vectors: Plain64, .. }");
    }
}
