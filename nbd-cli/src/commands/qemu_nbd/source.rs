//! The served image.

use std::sync::Arc;

use nbd_jobs::JobContext;
use nbd_jobs::qemu_nbd::Options;
use nbd_server::export::Export;

use super::refusal::{Refusal, complain};
use crate::connect::ServerArgs;
use crate::key_file::leave_no_dump;
use crate::serving::temporary_directory;
use crate::shown::warnings;

/// Opens it according to the options.
///
/// # Errors
///
/// If the options contradict each other or the image cannot be opened.
pub(super) fn open(options: &Options) -> Result<Arc<dyn Export>, Refusal> {
    if options.has_secrets() {
        leave_no_dump();
    }
    let context = JobContext { observer: warnings(), ..JobContext::default() };
    let remotes = ServerArgs::default().remotes();
    let opened = options.open(&context, temporary_directory(), &remotes)?;
    if opened.is_guessed_raw
        && let Some(file) = options.files.first()
    {
        let name = file.display();
        complain(&format!(
            "WARNING: Image format was not specified for '{name}' and probing guessed raw; writes \
             to the first sector that would make it look like another format are refused. Specify \
             the format with -f raw to allow them."
        ));
    }
    Ok(opened.export)
}
