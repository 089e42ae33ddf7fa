//! Sources and destinations on the command line.

use std::ffi::OsStr;

use clap::builder::TypedValueParser;
use clap::error::ErrorKind;
use nbd_jobs::qemu_name::path_in;
use nbd_jobs::{DescribedLocation, Location};

/// Parses a location; file names need not be UTF-8.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LocationParser;

impl TypedValueParser for LocationParser {
    type Value = DescribedLocation;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<Self::Value, clap::Error> {
        let Some(text) = value.to_str() else {
            return Ok(Location::File(path_in(value).into()).into());
        };
        text.parse().map_err(|why| {
            let name = argument.map(ToString::to_string).unwrap_or_default();
            let message = format!("invalid value '{text}' for '{name}': {why}\n");
            clap::Error::raw(ErrorKind::ValueValidation, message).with_cmd(command)
        })
    }
}
