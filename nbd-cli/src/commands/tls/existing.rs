//! The flag `--force`.

use nbd_jobs::certificates::ExistingCredentials;

/// Returns the treatment of existing files.
pub(super) fn existing(force: bool) -> ExistingCredentials {
    if force { ExistingCredentials::Replace } else { ExistingCredentials::Refuse }
}
