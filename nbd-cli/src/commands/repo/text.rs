//! Words and lines of the commands.

use nbd_objects::repo::Id;

use crate::error::{CommandError, Outcome};
use crate::output::Output;

pub(super) fn id(text: &str) -> Result<Id, String> {
    text.parse().map_err(|()| "an identity has 32 hexadecimal digits".to_owned())
}

pub(super) fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse::<f64>().ok();
    let number = number.filter(|number| (0.0..=100.0).contains(number));
    number.ok_or_else(|| "give a part from 0% to 100%".to_owned())
}

/// Prints one line.
pub(super) fn line(text: &str) -> Result<Outcome, CommandError> {
    let mut output = Output::new();
    output.line(text)?;
    output.finish()?;
    Ok(Outcome::Success)
}
