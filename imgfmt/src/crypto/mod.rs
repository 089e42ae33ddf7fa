//! Encrypted disks: ciphers of sectors, derivation of keys, and LUKS.
//!
//! [`Encrypted`] is a storage that decrypts what is read from another storage and encrypts what is
//! written to it. Images above it know nothing about ciphers. It has no file descriptors and no
//! place for writes that others carry out, so its ciphertext is neither sent nor changed by
//! mistake: callers that move bytes themselves ask each storage for a descriptor first.

mod block;
mod cipher;
mod encrypted;
mod error;
mod hash;
mod kdf;
pub(crate) mod luks;
mod memory;
mod old_aes;
mod split;
mod sum_key;
mod xts;

pub(crate) use encrypted::Encrypted;
pub(crate) use luks::Volume;
pub(crate) use old_aes::OldAes;
pub(crate) use sum_key::SumKey;
