//! File names on the command line, for commands that accept nothing else.

use std::ffi::OsStr;
use std::path::PathBuf;

use clap::builder::TypedValueParser;
use clap::error::ErrorKind;
use nbd_jobs::qemu_name::path_in;

/// Parses the path of a file, which may begin with `file:` as in QEMU and need not be UTF-8.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FilePathParser;

impl TypedValueParser for FilePathParser {
    type Value = PathBuf;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<Self::Value, clap::Error> {
        let path = path_in(value);
        let why = match value.to_str() {
            _ if path.as_os_str().is_empty() => "it is empty; give the name of a file",
            Some(text) if text.starts_with("json:") => {
                "give a file to be changed by its name, and its format by an option"
            }
            _ => return Ok(path.to_owned()),
        };
        let name = argument.map(ToString::to_string).unwrap_or_default();
        let message = format!("invalid value '{}' for '{name}': {why}\n", value.display());
        Err(clap::Error::raw(ErrorKind::ValueValidation, message).with_cmd(command))
    }
}
