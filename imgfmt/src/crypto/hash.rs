//! Hash functions by the names that LUKS headers use.

use openssl::hash::MessageDigest;
use openssl::nid::Nid;

use super::error::unsupported;
use crate::error::Result;

/// The names that `cryptsetup` and QEMU write. Names are compared without regard to case.
const NAMES: [&str; 6] = ["sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160"];

/// What an iteration with a hash costs, in iterations of SHA-256, measured with OpenSSL and rounded
/// up.
pub(super) fn cost(hash: MessageDigest) -> u64 {
    match hash.type_() {
        Nid::SHA384 | Nid::SHA512 => 2,
        Nid::RIPEMD160 => 4,
        _ => 1,
    }
}

/// The hash of that name.
pub(super) fn by_name(name: &str) -> Result<MessageDigest> {
    let known = NAMES.iter().find(|known| known.eq_ignore_ascii_case(name));
    known.and_then(|known| MessageDigest::from_name(known)).ok_or_else(|| {
        let name = name.escape_debug();
        unsupported(format!("it uses the hash '{name}', which is not supported"))
    })
}
