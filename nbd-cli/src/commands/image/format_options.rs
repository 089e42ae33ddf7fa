//! `-o`: the options that only one format has.

use clap::Args;
use imgfmt::{
    CompressionType, CreateOptions, Format, L2Entries, LazyRefcounts, Preallocation, Qcow2Version,
};
use nbd_jobs::foreign_options;
use nbd_jobs::key_values::KeyValues;
use nbd_jobs::qemu_numbers::parse_size;
use nbd_jobs::text::printable;

use crate::error::CommandError;
use crate::output::Output;

const RAW: &[(&str, &str)] =
    &[("preallocation=<str>", "When space is allocated: off (default), falloc or full")];
const QCOW2: &[(&str, &str)] = &[
    ("cluster_size=<size>", "Size of a cluster: a power of two from 512 to 2M"),
    ("compat=<str>", "Version of the format: 0.10 (v2) or 1.1 (v3, default)"),
    ("compression_type=<str>", "Compression of clusters: zlib (default) or zstd"),
    ("extended_l2=<bool (on/off)>", "Whether parts of clusters are allocated"),
    ("lazy_refcounts=<bool (on/off)>", "Whether refcounts may be updated late"),
    ("preallocation=<str>", "When space is allocated: off (default), metadata, falloc or full"),
    ("refcount_bits=<num>", "Width of a refcount in bits: a power of two from 1 to 64"),
];

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
        let known = match create.format {
            Format::Raw => RAW,
            Format::Qcow2 => QCOW2,
            other => foreign_options::known(other),
        };
        let mut output = Output::new();
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
        if matches!(create.format, Format::Raw | Format::Qcow2) {
            take_own(create, &mut options).map_err(CommandError::new)?;
        }
        foreign_options::take(create.format, &mut options, &mut create.foreign)
            .map_err(CommandError::new)?;
        match options.left_over() {
            None => Ok(()),
            Some(key) => Err(CommandError::new(format!(
                "{} images have no option '{}'; see -o help",
                create.format,
                printable(key)
            ))),
        }
    }
}

/// Sets the options of raw and qcow2 images; those that are not given stay as they are.
fn take_own(create: &mut CreateOptions, options: &mut KeyValues) -> Result<(), String> {
    let refused = |key: &str, value: &str| {
        format!("Parameter '{key}' does not accept value '{}'", printable(value))
    };
    let is_qcow2 = create.format == Format::Qcow2;
    if let Some(value) = options.take("preallocation") {
        create.preallocation = match value.as_str() {
            "off" => Preallocation::Off,
            "metadata" if is_qcow2 => Preallocation::Metadata,
            "falloc" => Preallocation::Falloc,
            "full" => Preallocation::Full,
            other => return Err(refused("preallocation", other)),
        };
    }
    if !is_qcow2 {
        return Ok(());
    }
    if let Some(value) = options.take("cluster_size") {
        create.cluster_size = parse_size(&value).ok_or_else(|| refused("cluster_size", &value))?;
    }
    if let Some(value) = options.take("refcount_bits") {
        create.refcount_bits = value.parse().map_err(|_| refused("refcount_bits", &value))?;
    }
    if let Some(value) = options.take("compat") {
        create.version = match value.as_str() {
            "0.10" | "v2" => Qcow2Version::V2,
            "1.1" | "v3" => Qcow2Version::V3,
            other => return Err(refused("compat", other)),
        };
    }
    if let Some(value) = options.take("compression_type") {
        create.compression = match value.as_str() {
            "zlib" => CompressionType::Zlib,
            "zstd" => CompressionType::Zstd,
            other => return Err(refused("compression_type", other)),
        };
    }
    if let Some(is_on) = options.take_switch("extended_l2")? {
        create.l2_entries = if is_on { L2Entries::Extended } else { L2Entries::Standard };
    }
    if let Some(is_on) = options.take_switch("lazy_refcounts")? {
        create.lazy_refcounts = if is_on { LazyRefcounts::On } else { LazyRefcounts::Off };
    }
    Ok(())
}
