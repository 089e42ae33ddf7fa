//! Members of the JSON text of a version 2 header. Numbers of 64 bits are strings there, and bytes
//! are in base64.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde_json::Value;

use crate::crypto::error::invalid;
use crate::error::{Error, Result};

/// The maximum number of slots, and of digests, in a header: that of `cryptsetup`.
const NUMBERED_MAX: usize = 32;

fn wrong(name: &str) -> Error {
    invalid(format!("'{name}' is missing or wrong in its LUKS header"))
}

pub(super) fn text<'v>(value: &'v Value, name: &str) -> Result<&'v str> {
    value.get(name).and_then(Value::as_str).ok_or_else(|| wrong(name))
}

pub(super) fn small(value: &Value, name: &str) -> Result<u32> {
    let number = value.get(name).and_then(Value::as_u64);
    number.and_then(|number| u32::try_from(number).ok()).ok_or_else(|| wrong(name))
}

/// A number that is written as a string.
pub(super) fn large(value: &Value, name: &str) -> Result<u64> {
    let text = text(value, name)?;
    match text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => text.parse().map_err(|_| wrong(name)),
        false => Err(wrong(name)),
    }
}

/// Bytes of which there may be as many as `lengths` says.
pub(super) fn bytes(value: &Value, name: &str, lengths: RangeInclusive<usize>) -> Result<Vec<u8>> {
    let text = text(value, name)?;
    // Before anything is allocated.
    if text.len() > lengths.end().div_ceil(3) * 4 {
        return Err(wrong(name));
    }
    let bytes = openssl::base64::decode_block(text).map_err(|_| wrong(name))?;
    if lengths.contains(&bytes.len()) { Ok(bytes) } else { Err(wrong(name)) }
}

/// The cipher and the mode of a name such as `aes-xts-plain64`.
pub(super) fn cipher(value: &Value) -> Result<(String, String)> {
    let name = text(value, "encryption")?;
    let (cipher, mode) = name.split_once('-').unwrap_or((name, ""));
    Ok((cipher.to_owned(), mode.to_owned()))
}

/// The values of an object whose names are numbers, by ascending numbers: at most [`NUMBERED_MAX`].
pub(super) fn numbered<'v>(value: &'v Value, name: &str) -> Result<BTreeMap<u32, &'v Value>> {
    let object = value.get(name).and_then(Value::as_object).ok_or_else(|| wrong(name))?;
    if object.len() > NUMBERED_MAX {
        let count = object.len();
        return Err(invalid(format!(
            "its LUKS header has {count} '{name}', and there can be {NUMBERED_MAX}"
        )));
    }
    let numbered = object.iter().map(|(number, value)| {
        let parsed = number.parse().ok().filter(|parsed: &u32| parsed.to_string() == *number);
        parsed.map(|parsed| (parsed, value)).ok_or_else(|| wrong(name))
    });
    numbered.collect()
}

pub(super) fn member<'v>(value: &'v Value, name: &str) -> Result<&'v Value> {
    value.get(name).ok_or_else(|| wrong(name))
}

/// The names and values of an object.
pub(super) fn members<'v>(
    value: &'v Value,
    name: &str,
) -> Result<impl Iterator<Item = (&'v str, &'v Value)> + use<'v>> {
    let object = value.get(name).and_then(Value::as_object).ok_or_else(|| wrong(name))?;
    Ok(object.iter().map(|(name, value)| (&**name, value)))
}

/// Whether a list of strings has one among its first [`NUMBERED_MAX`].
pub(super) fn lists(value: &Value, name: &str, wanted: &str) -> bool {
    let list = value.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    list.iter().take(NUMBERED_MAX).any(|entry| entry.as_str() == Some(wanted))
}
