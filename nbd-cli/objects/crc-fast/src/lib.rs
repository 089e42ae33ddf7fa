//! CRC-64/NVME, in place of the crate `crc-fast` of the registry.
//!
//! `object_store` can send this checksum with an upload to S3, and takes it from `crc-fast`, which
//! has all CRCs in use, each for several kinds of processors: 0.7 MiB of the program. Uploads of
//! `nbd-objects` are checked by SHA-256, so this code does not run. It is right all the same, in
//! case that a configuration asks for it, but not fast: it takes a byte at a time.
//!
//! The manifest of the workspace puts it in the other's place (`[patch.crates-io]`). Products that
//! take `nbd-objects` from the registry are not concerned.

/// The checksums; one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrcAlgorithm {
    /// CRC-64/NVME, as the NVM Express specification defines it.
    Crc64Nvme,
}

/// The state of a checksum.
#[derive(Clone, Debug)]
pub struct Digest(u64);

/// The polynomial, its lowest power in the highest bit.
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;

/// The remainder of each byte.
static TABLE: [u64; 256] = table();

const fn table() -> [u64; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < table.len() {
        let mut remainder = byte as u64;
        let mut bit = 0;
        while bit < 8 {
            let is_odd = remainder & 1 == 1;
            remainder = (remainder >> 1) ^ if is_odd { POLYNOMIAL } else { 0 };
            bit += 1;
        }
        table[byte] = remainder;
        byte += 1;
    }
    table
}

impl Digest {
    /// The checksum of no bytes.
    #[must_use]
    pub fn new(algorithm: CrcAlgorithm) -> Self {
        match algorithm {
            CrcAlgorithm::Crc64Nvme => Self(u64::MAX),
        }
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let index = (self.0 ^ u64::from(*byte)) & 0xff;
            self.0 = (self.0 >> 8) ^ TABLE[index as usize];
        }
    }

    /// Returns the checksum of all bytes.
    #[must_use]
    pub fn finalize(&self) -> u64 {
        !self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The specification's check values (NVM Express, NVM Command Set, 5.2.1.3.4) and the
    /// catalogue's.
    #[test]
    fn the_published_values() {
        let crc = |parts: &[&[u8]]| {
            let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
            parts.iter().for_each(|part| digest.update(part));
            digest.finalize()
        };
        assert_eq!(crc(&[b"1234", b"", b"56789"]), 0xae8b_1486_0a79_9888);
        assert_eq!(crc(&[&[0; 4096]]), 0x6482_d367_eb22_b64e);
        assert_eq!(crc(&[&[0xff; 4096]]), 0xc0dd_ba73_02ec_a3ac);
        assert_eq!(crc(&[]), 0);
    }
}
