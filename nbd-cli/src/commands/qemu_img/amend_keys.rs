//! The options of `qemu-img amend` that change the passphrases of an encrypted image.

use std::time::Duration;

use imgfmt::{Format, KeyChange, NewKey};
use nbd_jobs::disk_options::not_accepted;
use nbd_jobs::key_values::KeyValues;

use super::encryption::ITER_TIME_MAX;
use super::refusal::Refusal;
use super::secrets::Secrets;

const NAMES: [&str; 5] = ["state", "new-secret", "old-secret", "keyslot", "iter-time"];

/// Removes the options of a change of passphrases of an image of this format, which may be none.
///
/// # Errors
///
/// If they are malformed, incomplete or contradict each other, or there is no such secret.
pub(super) fn take(
    format: Format,
    options: &mut KeyValues,
    secrets: &Secrets,
) -> Result<Option<KeyChange>, Refusal> {
    let prefix = match format {
        Format::Luks => "",
        Format::Qcow2 => "encrypt.",
        _ => return Ok(None),
    };
    let [state, new, old, slot, time] = NAMES.map(|name| options.take(&format!("{prefix}{name}")));
    if [&state, &new, &old, &slot, &time].into_iter().all(Option::is_none) {
        return Ok(None);
    }
    let with = |name: &str| format!("{prefix}{name}");
    let number = |name: &str, text: &str| {
        text.parse::<u64>().map_err(|_| Refusal::new(not_accepted(&with(name), text)))
    };
    let slot = slot.map(|text| {
        let number = number("keyslot", &text)?;
        u32::try_from(number).map_err(|_| Refusal::new(not_accepted(&with("keyslot"), &text)))
    });
    let slot = slot.transpose()?;
    let passphrase = |id: &str| secrets.passphrase(id).map_err(Refusal::new);
    let without = |name: &str, given: bool, state: &str| match given {
        true => Err(Refusal::new(format!("'{}' is not for state={state}", with(name)))),
        false => Ok(()),
    };
    match state.as_deref() {
        Some("active") => {
            without("old-secret", old.is_some(), "active")?;
            let id = new.ok_or_else(|| {
                Refusal::new(format!("'{}' is needed for a new passphrase", with("new-secret")))
            })?;
            let mut key = NewKey::new(secrets.new_passphrase(&id).map_err(Refusal::new)?);
            if let Some(text) = time {
                let time = number("iter-time", &text)?;
                if time > ITER_TIME_MAX {
                    return Err(Refusal::new(not_accepted(&with("iter-time"), &text)));
                }
                // As in QEMU, 0 is the default.
                if time > 0 {
                    key = key.iteration_time(Duration::from_millis(time));
                }
            }
            Ok(Some(KeyChange::Add { key, slot }))
        }
        Some("inactive") => {
            without("new-secret", new.is_some(), "inactive")?;
            without("iter-time", time.is_some(), "inactive")?;
            match (old, slot) {
                (Some(id), None) => Ok(Some(KeyChange::Remove(passphrase(&id)?))),
                (None, Some(slot)) => Ok(Some(KeyChange::RemoveSlot(slot))),
                _ => Err(Refusal::new(format!(
                    "state=inactive needs either '{}' or '{}'",
                    with("keyslot"),
                    with("old-secret")
                ))),
            }
        }
        Some(other) => Err(Refusal::new(not_accepted(&with("state"), other))),
        None => Err(Refusal::new(format!("Parameter '{}' is missing", with("state")))),
    }
}
