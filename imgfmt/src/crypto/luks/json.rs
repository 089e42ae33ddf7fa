//! Members of the JSON text of a version 2 header. Numbers of 64 bits are strings there, and bytes
//! are in base64.

use serde_json::Value;

use crate::crypto::error::invalid;
use crate::error::{Error, Result};

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

pub(super) fn bytes(value: &Value, name: &str) -> Result<Vec<u8>> {
    openssl::base64::decode_block(text(value, name)?).map_err(|_| wrong(name))
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

/// Whether a list of strings has one.
pub(super) fn lists(value: &Value, name: &str, wanted: &str) -> bool {
    let list = value.get(name).and_then(Value::as_array);
    list.is_some_and(|list| list.iter().any(|entry| entry.as_str() == Some(wanted)))
}
