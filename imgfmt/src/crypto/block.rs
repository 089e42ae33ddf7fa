//! AES on single blocks, of which modes are made.

use openssl::cipher::{Cipher, CipherRef};
use openssl::cipher_ctx::CipherCtx;
use openssl::error::ErrorStack;

/// The block of AES, in bytes.
pub(super) const BLOCK: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Encrypt,
    Decrypt,
}

/// AES with a key of that length in bytes, in the mode ECB.
pub(super) fn ecb(key_length: usize) -> Option<&'static CipherRef> {
    match key_length {
        16 => Some(Cipher::aes_128_ecb()),
        24 => Some(Cipher::aes_192_ecb()),
        32 => Some(Cipher::aes_256_ecb()),
        _ => None,
    }
}

/// Encrypts or decrypts single blocks with this key.
pub(super) fn blocks(direction: Direction, key: &[u8]) -> Result<CipherCtx, ErrorStack> {
    let mut context = CipherCtx::new()?;
    match direction {
        Direction::Encrypt => context.encrypt_init(ecb(key.len()), Some(key), None)?,
        Direction::Decrypt => context.decrypt_init(ecb(key.len()), Some(key), None)?,
    }
    context.set_padding(false);
    Ok(context)
}
