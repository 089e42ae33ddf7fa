//! Digests of a disk's content.

use std::fmt;

use bytes::Bytes;
use imgfmt::zero::is_zero;
use openssl::hash::{Hasher, MessageDigest, hash};

use crate::error::{JobError, JobErrorKind};
use crate::text::printable;
use crate::zeroes::ZEROES;

/// Size of a block of [`ChecksumAlgorithm::Blkhash`], in bytes.
const BLOCK: usize = 64 << 10;
/// Digests of blocks of zeroes that the outer digest is given at a time.
const ZERO_BLOCKS: u64 = 1024;

/// The digests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChecksumAlgorithm {
    /// SHA-256 of the disk as a raw file, of 64 digits.
    #[default]
    Sha256,
    /// SHA-512 of the disk as a raw file, of 128 digits.
    Sha512,
    /// The block hash of `blksum` and of nbdcopy's `--blkhash` with their defaults, of 64 digits:
    /// SHA-256 of the SHA-256 of each block of 64 KiB and of the size as a little-endian 64-bit
    /// number. The last block may be shorter. Blocks are digested in parallel, and holes cost
    /// almost nothing.
    Blkhash,
}

impl ChecksumAlgorithm {
    /// Returns its name in lower case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
            Self::Blkhash => "blkhash",
        }
    }

    fn digest(self) -> MessageDigest {
        match self {
            Self::Sha256 | Self::Blkhash => MessageDigest::sha256(),
            Self::Sha512 => MessageDigest::sha512(),
        }
    }

    /// Parses a checksum in hexadecimal, in upper or lower case.
    ///
    /// # Errors
    ///
    /// A sentence, if it does not have the digits of this algorithm.
    pub fn parse(self, text: &str) -> Result<Checksum, JobError> {
        let digits = 2 * self.digest().size();
        if text.len() != digits || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(JobError::invalid(format!(
                "'{}' is not a {}: it has {digits} hexadecimal digits",
                printable(text),
                self.name()
            )));
        }
        Ok(Checksum { algorithm: self, digits: text.to_ascii_lowercase() })
    }

    /// The work on the bytes at `offset` that needs no order, for the threads that read.
    pub(crate) fn prepare(self, offset: u64, data: Bytes) -> Result<Piece, JobError> {
        let is_whole = |number: u64| number.is_multiple_of(BLOCK as u64);
        if self != Self::Blkhash || !is_whole(offset) || !is_whole(data.len() as u64) {
            return Ok(Piece::Bytes(data));
        }
        let mut zero = None;
        let mut digests = Vec::with_capacity(data.len() / BLOCK * self.digest().size());
        for block in data.chunks(BLOCK) {
            let known = zero.filter(|_| is_zero(block));
            let digest = known
                .map_or_else(|| hash(self.digest(), block), Ok)
                .map_err(|error| failed(&error))?;
            if zero.is_none() && is_zero(block) {
                zero = Some(digest);
            }
            digests.extend_from_slice(&digest);
        }
        Ok(Piece::Blocks { digests, length: data.len() as u64 })
    }
}

/// The digest of a disk. It is displayed in hexadecimal, in lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksum {
    algorithm: ChecksumAlgorithm,
    digits: String,
}

impl Checksum {
    /// Returns the algorithm.
    #[must_use]
    pub fn algorithm(&self) -> ChecksumAlgorithm {
        self.algorithm
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.digits)
    }
}

/// The next bytes of a disk.
#[derive(Debug)]
pub(crate) enum Piece {
    Bytes(Bytes),
    Zeroes(u64),
    /// The digests of whole blocks, and how many bytes those have.
    Blocks {
        digests: Vec<u8>,
        length: u64,
    },
}

impl Piece {
    /// Returns the number of its bytes.
    pub(crate) fn length(&self) -> u64 {
        match self {
            Self::Bytes(data) => data.len() as u64,
            Self::Zeroes(length) | Self::Blocks { length, .. } => *length,
        }
    }
}

/// A digest of pieces in order.
pub(crate) struct Digest {
    algorithm: ChecksumAlgorithm,
    hasher: Hasher,
    /// Bytes so far.
    length: u64,
    /// The digest of the block that is not complete, for a digest of blocks.
    block: Hasher,
}

impl Digest {
    pub(crate) fn new(algorithm: ChecksumAlgorithm) -> Result<Self, JobError> {
        let new = || {
            Hasher::new(algorithm.digest()).map_err(|error| {
                let message = format!("OpenSSL lacks {}: {error}", algorithm.name());
                JobError::new(JobErrorKind::Internal, message)
            })
        };
        Ok(Self { algorithm, hasher: new()?, length: 0, block: new()? })
    }

    /// Adds the bytes that follow.
    pub(crate) fn add(&mut self, piece: &Piece) -> Result<(), JobError> {
        match piece {
            Piece::Zeroes(length) => self.zeroes(*length),
            Piece::Bytes(data) => self.bytes(data),
            Piece::Blocks { digests, length } => {
                self.length += length;
                self.hasher.update(digests).map_err(|error| failed(&error))
            }
        }
    }

    fn bytes(&mut self, mut data: &[u8]) -> Result<(), JobError> {
        if self.algorithm != ChecksumAlgorithm::Blkhash {
            self.length += data.len() as u64;
            return self.hasher.update(data).map_err(|error| failed(&error));
        }
        while !data.is_empty() {
            let room = BLOCK - (self.length % BLOCK as u64) as usize;
            let (part, rest) = data.split_at(room.min(data.len()));
            self.block.update(part).map_err(|error| failed(&error))?;
            self.length += part.len() as u64;
            if self.length.is_multiple_of(BLOCK as u64) {
                self.end_block()?;
            }
            data = rest;
        }
        Ok(())
    }

    fn end_block(&mut self) -> Result<(), JobError> {
        let digest = self.block.finish().map_err(|error| failed(&error))?;
        self.hasher.update(&digest).map_err(|error| failed(&error))
    }

    fn zeroes(&mut self, mut length: u64) -> Result<(), JobError> {
        let block = BLOCK as u64;
        let is_blocks = self.algorithm == ChecksumAlgorithm::Blkhash;
        while length > 0 {
            let into = self.length % block;
            if is_blocks && into == 0 && length >= block {
                let blocks = length / block;
                self.zero_blocks(blocks)?;
                length -= blocks * block;
                continue;
            }
            let part = length.min(block - into);
            self.bytes(&ZEROES[..part as usize])?;
            length -= part;
        }
        Ok(())
    }

    fn zero_blocks(&mut self, mut blocks: u64) -> Result<(), JobError> {
        let zero =
            hash(self.algorithm.digest(), &ZEROES[..BLOCK]).map_err(|error| failed(&error))?;
        let digests = zero.repeat(blocks.min(ZERO_BLOCKS) as usize);
        self.length += blocks * BLOCK as u64;
        while blocks > 0 {
            let part = blocks.min(ZERO_BLOCKS);
            let digests = &digests[..part as usize * zero.len()];
            self.hasher.update(digests).map_err(|error| failed(&error))?;
            blocks -= part;
        }
        Ok(())
    }

    /// Returns the digest of all bytes, after which none follow.
    pub(crate) fn finish(&mut self) -> Result<Checksum, JobError> {
        if self.algorithm == ChecksumAlgorithm::Blkhash {
            if !self.length.is_multiple_of(BLOCK as u64) {
                self.end_block()?;
            }
            let length = self.length.to_le_bytes();
            self.hasher.update(&length).map_err(|error| failed(&error))?;
        }
        let digest = self.hasher.finish().map_err(|error| failed(&error))?;
        let digits = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Checksum { algorithm: self.algorithm, digits })
    }
}

fn failed(error: &openssl::error::ErrorStack) -> JobError {
    JobError::new(JobErrorKind::Internal, format!("OpenSSL cannot compute the digest: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [ChecksumAlgorithm; 3] =
        [ChecksumAlgorithm::Sha256, ChecksumAlgorithm::Sha512, ChecksumAlgorithm::Blkhash];

    /// The digest of bytes that are prepared in pieces of this size, zeroes as zeroes.
    fn digest(algorithm: ChecksumAlgorithm, data: &[u8], piece: usize) -> String {
        let mut digest = Digest::new(algorithm).unwrap();
        for data in data.chunks(piece) {
            let offset = digest.length;
            let next = match is_zero(data) {
                true => Piece::Zeroes(data.len() as u64),
                false => algorithm.prepare(offset, Bytes::copy_from_slice(data)).unwrap(),
            };
            assert_eq!(next.length(), data.len() as u64);
            digest.add(&next).unwrap();
        }
        digest.finish().unwrap().to_string()
    }

    #[test]
    fn block_hashes_are_the_published_ones() {
        // Of libnbd's test of `nbdcopy --blkhash`, which are those of blkhash's reference.
        let mut far = b"hello".to_vec();
        far.resize(1 << 20, 0);
        far.extend(b"goodbye");
        for (data, expected) in [
            (vec![], "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc"),
            (b"hello".to_vec(), "337355feb53a5309d5aba92796223c2c84ffab930e706c01fef573a2722545e6"),
            (far, "61b8f3a8cea76e16eeff7ce27f1b7711c1f1e437f5038cec17773772a4bded28"),
            (
                b"12345678".repeat(512 * 256),
                "cbb388edd25e567b85f504c7b345497f9fb4f6bbf4e39768809184b9f9e678f8",
            ),
        ] {
            for piece in [1000, BLOCK - 1, BLOCK, 4 * BLOCK, 2 << 20] {
                let found = digest(ChecksumAlgorithm::Blkhash, &data, piece);
                assert_eq!(found, expected, "{} bytes in pieces of {piece}", data.len());
            }
        }
    }

    #[test]
    fn the_pieces_of_a_disk_do_not_matter() {
        let mut data = vec![0; 5 * BLOCK + 777];
        data[BLOCK..2 * BLOCK].fill(1);
        data[3 * BLOCK + 5] = 2;
        for algorithm in ALL {
            let whole = digest(algorithm, &data, usize::MAX);
            for piece in [700, BLOCK / 2, BLOCK, BLOCK + 1, 3 * BLOCK] {
                assert_eq!(digest(algorithm, &data, piece), whole, "{algorithm:?}, {piece}");
            }
        }
        let sha = openssl::sha::sha256(&data).map(|byte| format!("{byte:02x}")).concat();
        assert_eq!(digest(ChecksumAlgorithm::Sha256, &data, BLOCK), sha);
    }

    #[test]
    fn a_large_hole_has_the_block_hash_of_its_zeroes() {
        let data = vec![0; (ZERO_BLOCKS as usize + 3) * BLOCK + 5];
        let mut read = Digest::new(ChecksumAlgorithm::Blkhash).unwrap();
        for data in data.chunks(1 << 20) {
            read.add(&Piece::Bytes(Bytes::copy_from_slice(data))).unwrap();
        }
        let mut known = Digest::new(ChecksumAlgorithm::Blkhash).unwrap();
        known.add(&Piece::Zeroes(data.len() as u64)).unwrap();
        assert_eq!(known.finish().unwrap(), read.finish().unwrap());
    }
}
