//! Names of image formats on the command line.

use std::ffi::OsStr;
use std::path::Path;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser, ValueParserFactory};
use clap::error::ErrorKind;
use clap::{Arg, Command};
use imgfmt::Format;

/// The formats that can be selected.
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

/// A warning for a raw image whose name suggests another format; `option` is the one for the
/// format.
pub(crate) fn name_of_another_format(path: &Path, format: Format, option: &str) -> Option<String> {
    let ending = path.extension().and_then(OsStr::to_str)?.to_ascii_lowercase();
    let help = match ending.as_str() {
        _ if format != Format::Raw => return None,
        "qcow2" => format!("add {option} qcow2 for the format that its name suggests"),
        "qcow" | "qed" | "vmdk" | "vdi" | "vhd" | "vhdx" => {
            "choose a name that ends with .raw or .img".to_owned()
        }
        _ => return None,
    };
    Some(format!("'{}' becomes a raw image: {help}", path.display().to_string().escape_debug()))
}

/// The formats with their help.
fn values() -> [PossibleValue; 2] {
    [
        PossibleValue::new("raw").help("The file is the disk, byte for byte"),
        PossibleValue::new("qcow2").help("QEMU's copy-on-write format"),
    ]
}

/// Parses the name of a format. A format that is detected but cannot be read is distinguished from
/// an unknown one.
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
        // Their usual names.
        let name = value.to_str().map(|name| if name == "vhd" { "vpc" } else { name });
        let known = name.and_then(Format::from_name).filter(|format| !format.is_supported());
        if let Some(format) = known {
            let message = format!(
                "the format {} is recognised but cannot be read or written yet; create qcow2 \
                 or raw images, and convert others to one of these first\n",
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
