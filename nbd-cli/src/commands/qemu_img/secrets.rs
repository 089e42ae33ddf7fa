//! The objects of `--object`: secrets, by their ids.

use std::collections::BTreeMap;

use imgfmt::Passphrase;
use nbd_jobs::key_values::KeyValues;
use nbd_jobs::secret::Secret;
use nbd_jobs::text::printable;

use super::refusal::Refusal;
use crate::key_file::leave_no_dump;

/// The secrets of a command line. As in QEMU, all of them are read, each once.
#[derive(Debug, Default)]
pub(super) struct Secrets(BTreeMap<String, Passphrase>);

impl Secrets {
    /// Reads the secret of an object.
    ///
    /// # Errors
    ///
    /// If the object is malformed or not supported, or the secret cannot be read.
    pub(super) fn read(&mut self, object: &str) -> Result<(), Refusal> {
        leave_no_dump();
        self.add(object).map_err(Refusal::new)
    }

    /// Returns the passphrase of that id.
    ///
    /// # Errors
    ///
    /// A sentence if there is none.
    pub(super) fn passphrase(&self, id: &str) -> Result<Passphrase, String> {
        let found = self.0.get(id).cloned();
        found.ok_or_else(|| format!("No secret with id '{}'", printable(id)))
    }

    fn add(&mut self, text: &str) -> Result<(), String> {
        let mut properties = KeyValues::parse(text, Some("qom-type"))?;
        let kind = properties.take("qom-type").unwrap_or_default();
        let id = properties.take("id").ok_or("Parameter 'id' is missing")?;
        match kind.as_str() {
            "secret" => {}
            "" => return Err("Parameter 'qom-type' is missing".to_owned()),
            kind => {
                return Err(format!(
                    "--object {} is not supported; for a server with TLS give the URI nbds://…, \
                     whose parameters name the credentials",
                    printable(kind)
                ));
            }
        }
        let secret = Secret::new(&mut properties)?;
        if let Some(key) = properties.left_over() {
            return Err(format!("Invalid parameter '{}'", printable(key)));
        }
        match self.0.insert(id.clone(), secret.read()?) {
            None => Ok(()),
            Some(_) => Err(format!("there are two objects with the id '{}'", printable(&id))),
        }
    }
}
