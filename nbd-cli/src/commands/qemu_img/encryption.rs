//! The options of encrypted new images, under the names of QEMU.

use std::time::Duration;

use imgfmt::{Format, NewKey};
use nbd_jobs::key_values::KeyValues;
use nbd_jobs::text::printable;

use super::refusal::Refusal;
use super::secrets::Secrets;

/// The options of a LUKS header, in the order in which QEMU reports them, with the only value that
/// new headers have.
const OPTIONS: [(&str, Option<&str>); 8] = [
    ("format", Some("luks")),
    ("key-secret", None),
    ("cipher-alg", Some("aes-256")),
    ("cipher-mode", Some("xts")),
    ("ivgen-alg", Some("plain64")),
    // Without use for plain64, so it is not recorded.
    ("ivgen-hash-alg", Some("sha256")),
    ("hash-alg", Some("sha256")),
    ("iter-time", None),
];

/// The longest time for one passphrase, in milliseconds. It is bounded by the iterations too.
pub(super) const ITER_TIME_MAX: u64 = 600_000;

/// What the options say, and how they are reported.
#[derive(Debug, Default)]
pub(super) struct Encrypted {
    pub(super) key: Option<NewKey>,
    pub(super) said: Vec<(String, String)>,
}

/// Removes the options of the encryption of an image of this format.
///
/// # Errors
///
/// If they are malformed, incomplete or not supported, or there is no such secret.
pub(super) fn take(
    format: Format,
    options: &mut KeyValues,
    secrets: &Secrets,
) -> Result<Encrypted, Refusal> {
    let prefix = match format {
        Format::Luks => "",
        Format::Qcow2 => "encrypt.",
        _ => return Ok(Encrypted::default()),
    };
    let is_old = format == Format::Qcow2
        && options.take_switch("encryption").map_err(Refusal::new)? == Some(true);
    let mut values = Vec::new();
    for (name, only) in OPTIONS {
        // A volume has no other format.
        if format == Format::Luks && name == "format" {
            continue;
        }
        if let Some(value) = options.take(&format!("{prefix}{name}")) {
            values.push((name, only, value));
        }
    }
    let given = |wanted| values.iter().find(|(name, ..)| *name == wanted).map(|(.., value)| value);
    if is_old || given("format").is_some_and(|format| format == "aes") {
        return Err(Refusal::new(
            "the old AES of qcow2 is not made: it is broken. Give encrypt.format=luks",
        ));
    }
    if values.is_empty() && format == Format::Qcow2 {
        return Ok(Encrypted::default());
    }
    if format == Format::Qcow2 && given("format").is_none() {
        return Err(Refusal::new("Parameter 'encrypt.format' is missing"));
    }
    for (name, only, value) in &values {
        if only.is_some_and(|only| only != value) {
            let supported = only.unwrap_or_default();
            return Err(Refusal::new(format!(
                "Parameter '{prefix}{name}' does not accept value '{}'; only '{supported}' is made here",
                printable(value)
            )));
        }
    }
    let Some(id) = given("key-secret") else {
        return Err(Refusal::new(format!("Parameter '{prefix}key-secret' is required for cipher")));
    };
    let mut key = NewKey::new(secrets.new_passphrase(id).map_err(Refusal::new)?);
    if let Some(text) = given("iter-time") {
        let time = text.parse().ok().filter(|time| *time <= ITER_TIME_MAX);
        let time = time.ok_or_else(|| {
            let text = printable(text);
            Refusal::new(format!("Parameter '{prefix}iter-time' does not accept value '{text}'"))
        })?;
        // As in QEMU, 0 is the default.
        if time > 0 {
            key = key.iteration_time(Duration::from_millis(time));
        }
    }
    let said = values.into_iter().map(|(name, _, value)| (format!("{prefix}{name}"), value));
    Ok(Encrypted { key: Some(key), said: said.collect() })
}
