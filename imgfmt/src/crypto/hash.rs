//! Hash functions by the names that LUKS headers use.

use openssl::hash::MessageDigest;

use super::error::unsupported;
use crate::error::Result;

/// The names that `cryptsetup` and QEMU write. Names are compared without regard to case.
const NAMES: [&str; 6] = ["sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160"];

/// The hash of that name.
pub(super) fn by_name(name: &str) -> Result<MessageDigest> {
    let known = NAMES.iter().find(|known| known.eq_ignore_ascii_case(name));
    known.and_then(|known| MessageDigest::from_name(known)).ok_or_else(|| {
        let name = name.escape_debug();
        unsupported(format!("it uses the hash '{name}', which is not supported"))
    })
}
