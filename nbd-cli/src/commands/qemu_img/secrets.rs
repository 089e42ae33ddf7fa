//! The objects of `--object`: secrets, and the credentials of TLS, by their ids.

use imgfmt::Passphrase;
use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::qemu_nbd::Objects;
use nbd_jobs::text::printable;

use super::refusal::Refusal;
use crate::key_file::leave_no_dump;

/// The objects of a command line. As in QEMU, all secrets are read, each once.
#[derive(Debug, Default)]
pub(super) struct Secrets(Objects);

impl Secrets {
    /// Reads the objects.
    ///
    /// # Errors
    ///
    /// If one is malformed or not supported, or a secret cannot be read.
    pub(super) fn read(objects: &[String]) -> Result<Self, Refusal> {
        let mut secrets = Self::default();
        if objects.is_empty() {
            return Ok(secrets);
        }
        leave_no_dump();
        let added = objects.iter().try_for_each(|object| secrets.0.add(object));
        added
            .and_then(|()| secrets.0.load_secrets())
            .map_err(|why| Refusal::new(printable(&why)))?;
        Ok(secrets)
    }

    /// Returns the passphrase of that id.
    ///
    /// # Errors
    ///
    /// A sentence if there is none.
    pub(super) fn passphrase(&self, id: &str) -> Result<Passphrase, String> {
        self.0.passphrase(id).map_err(|why| printable(&why))
    }

    /// Returns the passphrase of that id, for a new image.
    ///
    /// # Errors
    ///
    /// A sentence if there is none, or it is not text.
    pub(super) fn new_passphrase(&self, id: &str) -> Result<Passphrase, String> {
        self.0.new_passphrase(id).map_err(|why| printable(&why))
    }

    /// Resolves the credentials of TLS in the name of an image.
    ///
    /// # Errors
    ///
    /// A sentence if there are none of an id.
    pub(super) fn resolve(&self, location: &mut ImageLocation) -> Result<(), String> {
        let resolved = location.resolve_credentials(&|id, uri| self.0.secure(id, uri));
        resolved.map_err(|why| printable(&why))
    }
}
