//! Frames: blocks, map pages and other content as it is stored, compressed and, on request,
//! encrypted.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;

use openssl::sha::sha256;
use openssl::symm::{Cipher, decrypt_aead, encrypt_aead};

use super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::id::{Id, PackId};
use crate::crypto::hmac;

/// Bytes that encryption adds.
const TAG_LEN: usize = 16;
/// Content that is stored as it is.
const RAW: u8 = 0;
/// Content that is a frame of zstd.
const ZSTD: u8 = 1;
/// zstd's level. Its default is 3; 1 costs half of the time, for a tenth more space.
const LEVEL: i32 = 1;

/// Most bytes that a frame is longer than its content.
pub(crate) const OVERHEAD: usize = 1 + TAG_LEN;

/// The first half of a SHA-256, or of an HMAC-SHA-256 in an encrypted repository.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Hash(pub(crate) [u8; 16]);

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// Where a frame is. Encryption binds a frame to its place, so that none can be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FramePlace {
    /// The session that wrote it.
    pub(crate) session: Id,
    /// The number of the pack, or one of the numbers below.
    pub(crate) number: u32,
    /// The offset there, in bytes.
    pub(crate) offset: u32,
}

impl FramePlace {
    pub(crate) fn in_pack(pack: PackId, offset: u32) -> Self {
        Self { session: pack.session, number: pack.number, offset }
    }
}

/// Instead of a number of a pack: the object of a backup. Offset 0 is its head, 1 its body.
pub(crate) const ROOT: u32 = u32::MAX;
/// Instead of a number of a pack: the record of a session. Offset: its counter.
pub(crate) const SESSION: u32 = u32::MAX - 1;
/// Instead of a number of a pack: a condemned list, offset 0.
pub(crate) const CONDEMNED: u32 = u32::MAX - 2;
/// Instead of a number of a pack: the reader in a pin, offset 0.
pub(crate) const PIN: u32 = u32::MAX - 3;

/// Most packs of a session.
pub(crate) const PACKS_MAX: u32 = u32::MAX - 16;

/// Compresses, hashes and encrypts.
#[derive(Clone, Default)]
pub(crate) struct Sealer {
    keys: Option<Keys>,
}

#[derive(Clone)]
struct Keys {
    hash: [u8; 32],
    encryption: [u8; 32],
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer").field("encrypts", &self.keys.is_some()).finish()
    }
}

/// Why a frame cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// Its length is none that a frame can have.
    Length,
    /// It is not authentic: changed, moved, or of another repository.
    Authenticity,
    /// It does not decompress to as many bytes as it should.
    Compression,
    /// It holds something else than was written.
    Content,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Length => "has an impossible length",
            Self::Authenticity => "was changed, moved, or is another repository's",
            Self::Compression => "cannot be decompressed",
            Self::Content => "holds something else than was written",
        })
    }
}

impl Sealer {
    /// A sealer of an encrypted repository, by its master key.
    pub(crate) fn encrypting(master: &[u8; 32]) -> Self {
        let derive = |purpose: &[u8]| hmac(master, &[purpose]);
        let keys = Keys { hash: derive(b"hash of content"), encryption: derive(b"encryption") };
        Self { keys: Some(keys) }
    }

    /// Returns whether content is encrypted.
    #[cfg(test)]
    fn encrypts(&self) -> bool {
        self.keys.is_some()
    }

    /// The hash of content before compression.
    pub(crate) fn hash(&self, content: &[u8]) -> Hash {
        let full = match &self.keys {
            None => sha256(content),
            Some(keys) => hmac(&keys.hash, &[content]),
        };
        let mut half = [0; 16];
        half.copy_from_slice(&full[..16]);
        Hash(half)
    }

    /// The first of two steps to a frame: compresses content, where that makes it smaller.
    pub(crate) fn compress(content: &[u8]) -> Vec<u8> {
        let mut packed = vec![0; content.len() + 1];
        // A compressed form that is not smaller has no room.
        if let Some(room) = packed.get_mut(1..content.len())
            && let Some(length) = compress_into(content, room)
        {
            packed[0] = ZSTD;
            packed.truncate(length + 1);
            return packed;
        }
        packed[0] = RAW;
        packed[1..].copy_from_slice(content);
        packed
    }

    /// The second step: encrypts what [`compress`](Self::compress) returned, where the repository
    /// is encrypted. No two frames may have the same place.
    pub(crate) fn seal(&self, place: FramePlace, packed: Vec<u8>) -> Result<Vec<u8>> {
        let Some(keys) = &self.keys else { return Ok(packed) };
        let mut tag = [0; TAG_LEN];
        let (key, nonce) = (keys.of_session(place.session), nonce(place));
        let cipher = Cipher::aes_256_gcm();
        let sealed = encrypt_aead(cipher, &key, Some(&nonce), &[], &packed, &mut tag);
        let mut sealed = sealed.map_err(|error| {
            let message = format!("OpenSSL cannot encrypt: {error}");
            RepositoryError::new(RepositoryErrorKind::Invalid, message)
        })?;
        sealed.extend_from_slice(&tag);
        Ok(sealed)
    }

    /// Both steps in one.
    pub(crate) fn frame(&self, place: FramePlace, content: &[u8]) -> Result<Vec<u8>> {
        self.seal(place, Self::compress(content))
    }

    /// Returns the content of a frame, which has exactly `length` bytes and this hash.
    pub(crate) fn open(
        &self,
        place: FramePlace,
        frame: &[u8],
        length: usize,
        hash: Hash,
    ) -> std::result::Result<Vec<u8>, Broken> {
        let content = self.open_unknown(place, frame, length)?;
        match content.len() == length && self.hash(&content) == hash {
            true => Ok(content),
            false => Err(Broken::Content),
        }
    }

    /// Returns the content of a frame, which has at most `longest` bytes.
    pub(crate) fn open_unknown(
        &self,
        place: FramePlace,
        frame: &[u8],
        longest: usize,
    ) -> std::result::Result<Vec<u8>, Broken> {
        if frame.len() > longest.saturating_add(OVERHEAD) {
            return Err(Broken::Length);
        }
        Self::unpack(&self.unseal(place, frame)?, longest)
    }

    /// Takes back what [`seal`](Self::seal) did.
    fn unseal<'a>(
        &self,
        place: FramePlace,
        frame: &'a [u8],
    ) -> std::result::Result<Cow<'a, [u8]>, Broken> {
        let Some(keys) = &self.keys else { return Ok(Cow::Borrowed(frame)) };
        let (sealed, tag) = frame.split_last_chunk::<TAG_LEN>().ok_or(Broken::Length)?;
        let (key, nonce) = (keys.of_session(place.session), nonce(place));
        let opened = decrypt_aead(Cipher::aes_256_gcm(), &key, Some(&nonce), &[], sealed, tag);
        opened.map(Cow::Owned).map_err(|_| Broken::Authenticity)
    }

    /// Returns what is sealed in a frame, if its content has at most `longest` bytes and this hash:
    /// it can be sealed for another place.
    pub(crate) fn packed(
        &self,
        place: FramePlace,
        frame: &[u8],
        longest: usize,
        hash: Hash,
    ) -> std::result::Result<Vec<u8>, Broken> {
        if frame.len() > longest.saturating_add(OVERHEAD) {
            return Err(Broken::Length);
        }
        let packed = self.unseal(place, frame)?;
        match self.hash(&Self::unpack(&packed, longest)?) == hash {
            true => Ok(packed.into_owned()),
            false => Err(Broken::Content),
        }
    }

    fn unpack(packed: &[u8], longest: usize) -> std::result::Result<Vec<u8>, Broken> {
        match packed.split_first() {
            Some((&RAW, content)) if content.len() <= longest => Ok(content.to_vec()),
            // No more than `longest` bytes are ever allocated, whatever the frame says.
            Some((&ZSTD, packed)) => decompress(packed, longest).ok_or(Broken::Compression),
            _ => Err(Broken::Length),
        }
    }
}

thread_local! {
    /// Of this thread: it takes memory, and time to make.
    static COMPRESSOR: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Returns the content of a compressed frame, of at most `longest` bytes.
fn decompress(packed: &[u8], longest: usize) -> Option<Vec<u8>> {
    DECOMPRESSOR.with_borrow_mut(|decompressor| {
        if decompressor.is_none() {
            *decompressor = zstd::bulk::Decompressor::new().ok();
        }
        decompressor.as_mut()?.decompress(packed, longest).ok()
    })
}

/// Compresses content, and returns its length then; `None` if there is not enough room.
fn compress_into(content: &[u8], room: &mut [u8]) -> Option<usize> {
    COMPRESSOR.with_borrow_mut(|compressor| {
        if compressor.is_none() {
            *compressor = zstd::bulk::Compressor::new(LEVEL).ok();
        }
        compressor.as_mut()?.compress_to_buffer(content, room).ok()
    })
}

impl Keys {
    /// The key of a session: within it no place is used twice, so no nonce is.
    fn of_session(&self, session: Id) -> [u8; 32] {
        hmac(&self.encryption, &[session.bytes()])
    }
}

fn nonce(place: FramePlace) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[..4].copy_from_slice(&place.number.to_be_bytes());
    nonce[4..8].copy_from_slice(&place.offset.to_be_bytes());
    nonce
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(number: u32) -> FramePlace {
        FramePlace { session: Id::from_bytes([7; 16]), number, offset: 9 }
    }

    #[test]
    fn frames_hold_what_was_put_in_and_notice_every_change() {
        let random: Vec<u8> =
            (0..5000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for sealer in [Sealer::default(), Sealer::encrypting(&[3; 32])] {
            for content in [&b""[..], &[0; 65536], &random] {
                let hash = sealer.hash(content);
                let frame = sealer.frame(place(1), content).unwrap();
                assert!(frame.len() <= content.len() + OVERHEAD);
                let open = |place, frame: &[u8]| sealer.open(place, frame, content.len(), hash);
                assert_eq!(open(place(1), &frame).unwrap(), content);
                for at in (0..frame.len()).step_by(frame.len() / 40 + 1) {
                    let mut changed = frame.clone();
                    changed[at] ^= 1;
                    let opened = open(place(1), &changed);
                    assert!(opened.is_err() || opened.unwrap() == content);
                    assert!(open(place(1), &frame[..at]).is_err());
                }
                assert_eq!(open(place(2), &frame).is_err(), sealer.encrypts());
            }
        }
    }

    #[test]
    fn frame_that_says_to_be_huge_is_refused() {
        let sealer = Sealer::default();
        let bomb = Sealer::compress(&vec![0; 8 << 20]);
        assert!(bomb.len() < 2000);
        assert_eq!(sealer.open_unknown(place(0), &bomb, 65536), Err(Broken::Compression));
    }

    #[test]
    fn another_key_opens_nothing() {
        let (one, other) = (Sealer::encrypting(&[1; 32]), Sealer::encrypting(&[2; 32]));
        let frame = one.frame(place(0), b"secret").unwrap();
        assert!(!frame.windows(6).any(|part| part == b"secret"));
        assert_eq!(other.open_unknown(place(0), &frame, 100), Err(Broken::Authenticity));
        assert_ne!(one.hash(b"x"), other.hash(b"x"));
    }
}
