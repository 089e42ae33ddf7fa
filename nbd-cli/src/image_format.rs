//! Names of image formats on the command line.

use std::ffi::OsStr;
use std::path::Path;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser, ValueParserFactory};
use clap::error::ErrorKind;
use clap::{Arg, Command};
use imgfmt::Format;

/// A format that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageFormat(Format);

/// A format that can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewImageFormat(Format);

/// A format that backups are restored to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestoredFormat(Format);

impl ImageFormat {
    /// QEMU's copy-on-write format.
    pub const QCOW2: Self = Self(Format::Qcow2);
}

impl From<ImageFormat> for Format {
    fn from(format: ImageFormat) -> Self {
        format.0
    }
}

impl From<NewImageFormat> for Format {
    fn from(format: NewImageFormat) -> Self {
        format.0
    }
}

impl From<RestoredFormat> for Format {
    fn from(format: RestoredFormat) -> Self {
        format.0
    }
}

/// A warning for a raw image whose name suggests another format; `option` is the one for the
/// format.
pub(crate) fn name_of_another_format(path: &Path, format: Format, option: &str) -> Option<String> {
    let ending = path.extension().and_then(OsStr::to_str)?.to_ascii_lowercase();
    let help = match ending.as_str() {
        _ if format != Format::Raw => return None,
        "vhd" => format!("add {option} vpc for the format that its name suggests"),
        "qcow2" | "vmdk" | "vdi" | "vhdx" => {
            format!("add {option} {ending} for the format that its name suggests")
        }
        "qcow" | "qed" => "choose a name that ends with .raw or .img".to_owned(),
        _ => return None,
    };
    Some(format!("'{}' becomes a raw image: {help}", path.display().to_string().escape_debug()))
}

/// Parses the name of a format. A format that is known and cannot be used here is distinguished
/// from an unknown one.
#[derive(Clone, Copy, Debug)]
pub struct ImageFormatParser<T> {
    /// What is done with images of the formats that are taken.
    can_be: fn(Format) -> bool,
    /// Why others are not taken.
    otherwise: &'static str,
    made: fn(Format) -> T,
}

impl ValueParserFactory for ImageFormat {
    type Parser = ImageFormatParser<Self>;

    fn value_parser() -> Self::Parser {
        ImageFormatParser {
            can_be: Format::is_supported,
            otherwise: "is recognised but cannot be read or written yet; create qcow2 or raw images, \
                        and convert others to one of these first",
            made: Self,
        }
    }
}

impl ValueParserFactory for NewImageFormat {
    type Parser = ImageFormatParser<Self>;

    fn value_parser() -> Self::Parser {
        ImageFormatParser {
            can_be: Format::can_be_made,
            otherwise: "is known, but such images cannot be made; make a qcow2 or raw image",
            made: Self,
        }
    }
}

impl ValueParserFactory for RestoredFormat {
    type Parser = ImageFormatParser<Self>;

    fn value_parser() -> Self::Parser {
        ImageFormatParser {
            can_be: |format| matches!(format, Format::Raw | Format::Qcow2),
            otherwise: "is known, but backups are restored to raw or qcow2; convert that afterwards with \
                        'nbd-cli image convert'",
            made: Self,
        }
    }
}

impl<T> ImageFormatParser<T> {
    fn values(&self) -> impl Iterator<Item = PossibleValue> + use<T> {
        let value = |format: Format| {
            let help = match format {
                Format::Raw => "The file is the disk, byte for byte",
                Format::Qcow2 => "QEMU's copy-on-write format",
                other => other.description(),
            };
            PossibleValue::new(format.name()).help(help)
        };
        let can_be = self.can_be;
        Format::all().filter(move |format| can_be(*format)).map(value)
    }
}

impl<T: Clone + Send + Sync + 'static> TypedValueParser for ImageFormatParser<T> {
    type Value = T;

    fn parse_ref(
        &self,
        command: &Command,
        argument: Option<&Arg>,
        value: &OsStr,
    ) -> Result<Self::Value, clap::Error> {
        // Their usual names.
        let name = value.to_str().map(|name| if name == "vhd" { "vpc" } else { name });
        match name.and_then(Format::from_name) {
            Some(format) if (self.can_be)(format) => Ok((self.made)(format)),
            Some(format) => {
                let (what, otherwise) = (format.description(), self.otherwise);
                let message = format!("the format {what} {otherwise}\n");
                Err(clap::Error::raw(ErrorKind::InvalidValue, message).with_cmd(command))
            }
            // It says which there are.
            None => {
                let values: Vec<PossibleValue> = self.values().collect();
                let parsed = PossibleValuesParser::new(values).parse_ref(command, argument, value);
                parsed.map(|_| (self.made)(Format::Raw))
            }
        }
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.values()))
    }
}
