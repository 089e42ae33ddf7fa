//! New passphrases of encrypted images, by command line options.

use std::time::Duration;

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser as _};
use imgfmt::NewKey;
use nbd_jobs::size::parse_duration;

use crate::error::CommandError;
use crate::key_file::KeyFile;

/// The longest time for one passphrase. It is bounded by the iterations too.
const ITER_TIME_MAX: Duration = Duration::from_secs(600);

/// How much work each guess at a new passphrase is.
#[derive(Clone, Debug, Args)]
pub struct IterTimeArgs {
    /// Processor time that trying the new passphrase takes, at most 10 minutes; more protects a
    /// weak one better.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = parse_duration)]
    pub iter_time: Duration,
}

/// The file of a new passphrase.
#[derive(Clone, Debug, Args)]
pub struct NewKeyArgs {
    /// A file with the new passphrase, all bytes of it. '-' asks for it twice, or reads standard
    /// input if that is not a terminal; /dev/fd/N reads a descriptor.
    #[arg(long, value_name = "FILE", value_parser = OsStringValueParser::new().map(KeyFile::new))]
    pub new_key_file: Option<KeyFile>,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub iter_time: IterTimeArgs,
}

impl IterTimeArgs {
    /// Reads the passphrase of a new image.
    pub(crate) fn key(&self, file: &KeyFile) -> Result<NewKey, CommandError> {
        if self.iter_time > ITER_TIME_MAX {
            return Err(CommandError::new("--iter-time may be at most 10 minutes"));
        }
        Ok(NewKey::new(file.new_passphrase()?).iteration_time(self.iter_time))
    }
}
