//! The source and the target of a backup: the positional arguments.

use std::ffi::OsString;

use nbd_jobs::qemu_name::path_in;
use nbd_proto::NbdUri;

use super::args::BackupArgs;
use crate::error::CommandError;
#[cfg(feature = "object-storage")]
use crate::output::printable;

impl BackupArgs {
    /// Assigns the positional arguments to the disk and the new file.
    pub(super) fn assign_operands(&mut self) -> Result<(), CommandError> {
        #[cfg(feature = "object-storage")]
        if let Some(more) = self.more_operands.first() {
            return Err(CommandError::new(format!(
                "'{}' is one argument too many; several disks are for --name",
                printable(&more.to_string_lossy())
            )));
        }
        self.check_export()?;
        let first = std::mem::take(&mut self.first_operand);
        match self.second_operand.take() {
            Some(target) => {
                self.source = Some(uri(&first)?);
                self.target = path_in(&target).to_owned();
            }
            None if self.control.is_some() => self.target = path_in(&first).to_owned(),
            None if uri(&first).is_ok() => {
                return Err(CommandError::new(
                    "the new file is missing: give its name after the disk's URI",
                ));
            }
            None => {
                return Err(CommandError::new(
                    "the disk is missing: give its NBD URI in front of the new file, or --control",
                ));
            }
        }
        Ok(())
    }

    /// Refuses `--control` without the export.
    pub(super) fn check_export(&self) -> Result<(), CommandError> {
        match self.control.is_some() && self.export.is_none() {
            true => Err(CommandError::new("give the disk's export as well: --export NAME")),
            false => Ok(()),
        }
    }
}

fn uri(text: &OsString) -> Result<NbdUri, CommandError> {
    let text = text.to_string_lossy();
    text.parse().map_err(|error: nbd_proto::uri::UriError| {
        CommandError::new(match text.contains("://") {
            true => error.to_string(),
            false => format!(
                "{error}; to back up an image that no program uses, add --name NAME and give a \
                 repository"
            ),
        })
    })
}
