//! `-o`: the options that only one format has.

use clap::Args;
use imgfmt::CreateOptions;
use nbd_jobs::foreign_options;
use nbd_jobs::key_values::KeyValues;

use crate::error::CommandError;
use crate::output::Output;

/// Options of the format of a new image.
#[derive(Clone, Debug, Args)]
pub struct FormatOptions {
    /// Options that only the format has, as in qemu-img; 'help' lists them.
    #[arg(short = 'o', long = "option", value_name = "KEY=VALUE,...")]
    pub options: Vec<String>,
}

impl FormatOptions {
    /// Prints the options that a format has, if that is wanted; returns whether it was.
    pub(super) fn help(&self, create: &CreateOptions) -> Result<bool, CommandError> {
        let mut words = self.options.iter().flat_map(|list| list.split(','));
        if !words.any(|word| matches!(word, "help" | "?")) {
            return Ok(false);
        }
        let known = foreign_options::known(create.format);
        let mut output = Output::new();
        if known.is_empty() {
            let format = create.format;
            output.line(&format!("{format} images have no such options; see --help"))?;
        }
        for (option, meaning) in known {
            output.line(&format!("{option:<34} {meaning}"))?;
        }
        output.finish()?;
        Ok(true)
    }

    /// Sets the options of a new image.
    pub(super) fn apply(&self, create: &mut CreateOptions) -> Result<(), CommandError> {
        let mut options =
            KeyValues::parse(&self.options.join(","), None).map_err(CommandError::new)?;
        foreign_options::take(create.format, &mut options, &mut create.foreign)
            .map_err(CommandError::new)?;
        match options.left_over() {
            None => Ok(()),
            Some(key) => Err(CommandError::new(format!(
                "{} images have no option '{}'; see -o help",
                create.format,
                nbd_jobs::text::printable(key)
            ))),
        }
    }
}
