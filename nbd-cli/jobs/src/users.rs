//! The users and groups of this system (feature `server`).

use crate::sys;

/// Returns the id of a user, given by name or, as in chown, by number.
///
/// # Errors
///
/// A sentence if there is no such user, or the database cannot be read.
pub fn user_id(name: &str) -> Result<u32, String> {
    id("user", name, sys::user_id)
}

/// Returns the id of a group, given by name or, as in chown, by number.
///
/// # Errors
///
/// A sentence if there is no such group, or the database cannot be read.
pub fn group_id(name: &str) -> Result<u32, String> {
    id("group", name, sys::group_id)
}

/// A number is an id, as in chown.
fn id(
    kind: &str,
    name: &str,
    look_up: fn(&str) -> std::io::Result<Option<u32>>,
) -> Result<u32, String> {
    match look_up(name) {
        Ok(Some(id)) => Ok(id),
        Ok(None) => name.parse().map_err(|_| format!("there is no {kind} '{name}' on this system")),
        Err(error) => Err(format!("cannot look up the {kind} '{name}': {error}")),
    }
}
