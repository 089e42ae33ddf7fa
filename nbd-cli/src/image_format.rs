//! Image formats as they are given on the command line.

use std::ffi::OsStr;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser, ValueParserFactory};
use clap::error::ErrorKind;
use clap::{Arg, Command};
use imgfmt::Format;

/// Image formats that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// The file is the disk, byte for byte.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

impl From<ImageFormat> for Format {
    fn from(format: ImageFormat) -> Self {
        match format {
            ImageFormat::Raw => Self::Raw,
            ImageFormat::Qcow2 => Self::Qcow2,
        }
    }
}

/// The formats with their help.
fn values() -> [PossibleValue; 2] {
    [
        PossibleValue::new("raw").help("The file is the disk, byte for byte"),
        PossibleValue::new("qcow2").help("QEMU's copy-on-write format"),
    ]
}

/// Reads the name of a format. One that is recognised in files but cannot be read is told from one
/// that does not exist.
#[derive(Clone, Copy, Debug)]
pub struct ImageFormatParser;

impl ValueParserFactory for ImageFormat {
    type Parser = ImageFormatParser;

    fn value_parser() -> Self::Parser {
        ImageFormatParser
    }
}

impl TypedValueParser for ImageFormatParser {
    type Value = ImageFormat;

    fn parse_ref(
        &self,
        command: &Command,
        argument: Option<&Arg>,
        value: &OsStr,
    ) -> Result<Self::Value, clap::Error> {
        // As people call them.
        let name = value.to_str().map(|name| if name == "vhd" { "vpc" } else { name });
        let known = name.and_then(Format::from_name).filter(|format| !format.is_supported());
        if let Some(format) = known {
            let message = format!(
                "the format {} is recognised but cannot be read or written yet; use raw or qcow2\n",
                format.description()
            );
            return Err(clap::Error::raw(ErrorKind::InvalidValue, message).with_cmd(command));
        }
        let name = PossibleValuesParser::new(values()).parse_ref(command, argument, value)?;
        Ok(match name.as_str() {
            "qcow2" => ImageFormat::Qcow2,
            _ => ImageFormat::Raw,
        })
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(values().into_iter()))
    }
}
