//! The key slots of a version 2 header.

use std::ops::RangeInclusive;

use serde_json::Value;

use super::json;
use super::slot::{Digest, Slot};
use crate::crypto::error::{invalid, unsupported};
use crate::crypto::kdf::Kdf;
use crate::error::{Error, Result};

/// Lengths of a salt in bytes. `cryptsetup` writes 32.
const SALT: RangeInclusive<usize> = 8..=64;
/// Lengths of the digest of a key in bytes.
const DIGEST: RangeInclusive<usize> = 16..=64;
/// The priority of slots that are used only if the user names them.
const PRIORITY_IGNORED: u64 = 0;

/// Numbers of slots, with the reasons why they cannot be used.
pub(super) type Unusable = Vec<(u32, Error)>;

/// The slots that hold the key of a segment, by ascending numbers, and those of them that are
/// damaged or unknown. Fails if there are only such.
pub(super) fn slots_of(
    text: &Value,
    segment: &str,
    header_length: u64,
) -> Result<(Vec<Slot>, Unusable)> {
    let digests = json::numbered(text, "digests")?;
    let (mut slots, mut unusable) = (Vec::new(), Vec::new());
    for (number, slot) in json::numbered(text, "keyslots")? {
        let name = number.to_string();
        // As for `cryptsetup`, a slot belongs to the first digest that names it.
        let Some(digest) = digests.values().find(|digest| json::lists(digest, "keyslots", &name))
        else {
            continue;
        };
        let is_ignored = slot.get("priority").and_then(Value::as_u64) == Some(PRIORITY_IGNORED);
        if is_ignored || !json::lists(digest, "segments", segment) {
            continue;
        }
        match slot_of(number, slot, digest, header_length) {
            Ok(slot) => slots.push(slot),
            Err(error) => unusable.push((number, error)),
        }
    }
    if slots.is_empty() && !unusable.is_empty() {
        return Err(unusable.swap_remove(0).1);
    }
    Ok((slots, unusable))
}

fn slot_of(number: u32, slot: &Value, digest: &Value, header_length: u64) -> Result<Slot> {
    let kind = json::text(slot, "type")?;
    if kind != "luks2" {
        let kind = kind.escape_debug();
        return Err(unsupported(format!("a key slot of the type '{kind}' is not supported")));
    }
    let (area, af) = (json::member(slot, "area")?, json::member(slot, "af")?);
    for (what, kind, known) in
        [("area", json::text(area, "type")?, "raw"), ("af", json::text(af, "type")?, "luks1")]
    {
        if kind != known {
            let kind = kind.escape_debug();
            return Err(unsupported(format!(
                "a key slot with '{what}' of the type '{kind}' is not supported"
            )));
        }
    }
    let found = Slot {
        number,
        kdf: kdf_of(json::member(slot, "kdf")?)?,
        cipher: json::cipher(area)?,
        area_key_length: json::small(area, "key_size")?,
        offset: json::large(area, "offset")?,
        key_length: json::small(slot, "key_size")?,
        stripes: json::small(af, "stripes")?,
        split_hash: json::text(af, "hash")?.to_owned(),
        digest: digest_of(digest)?,
    };
    found.check()?;
    let is_too_small = found.material_length() > json::large(area, "size")?;
    if found.offset < 2 * header_length || is_too_small || found.end() == u64::MAX {
        return Err(invalid("a key slot overlaps the LUKS header or is too small"));
    }
    Ok(found)
}

fn kdf_of(kdf: &Value) -> Result<Kdf> {
    let salt = json::bytes(kdf, "salt", SALT)?;
    let kind = json::text(kdf, "type")?;
    let is_id = match kind {
        "pbkdf2" => {
            let hash = json::text(kdf, "hash")?.to_owned();
            return Ok(Kdf::Pbkdf2 { hash, iterations: json::small(kdf, "iterations")?, salt });
        }
        "argon2i" => false,
        "argon2id" => true,
        _ => {
            let kind = kind.escape_debug();
            return Err(unsupported(format!("keys derived by '{kind}' are not supported")));
        }
    };
    let (passes, memory_kib) = (json::small(kdf, "time")?, json::small(kdf, "memory")?);
    Ok(Kdf::Argon2 { is_id, passes, memory_kib, lanes: json::small(kdf, "cpus")?, salt })
}

fn digest_of(digest: &Value) -> Result<Digest> {
    let kind = json::text(digest, "type")?;
    if kind != "pbkdf2" {
        let kind = kind.escape_debug();
        return Err(unsupported(format!("a digest of the type '{kind}' is not supported")));
    }
    Ok(Digest {
        hash: json::text(digest, "hash")?.to_owned(),
        iterations: json::small(digest, "iterations")?,
        salt: json::bytes(digest, "salt", SALT)?,
        digest: json::bytes(digest, "digest", DIGEST)?,
    })
}
