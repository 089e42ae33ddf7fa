//! `-o`: the options that only one format has.

use clap::Args;
use imgfmt::{CreateOptions, Format};
use nbd_jobs::key_values::KeyValues;
use nbd_jobs::text::printable;
use nbd_jobs::{disk_options, foreign_options};

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

    /// Sets the options of a new image. `flags` are the options of the command line that say the
    /// same and were given: one of both would win silently.
    pub(super) fn apply(
        &self,
        create: &mut CreateOptions,
        flags: &[&str],
    ) -> Result<(), CommandError> {
        let mut options =
            KeyValues::parse(&self.options.join(","), None).map_err(CommandError::new)?;
        refuse_twice(&options, flags)?;
        if matches!(create.format, Format::Raw | Format::Qcow2)
            && let Some(name) = options.take("preallocation")
        {
            let found = disk_options::preallocation(&name, create.format);
            create.preallocation = found.map_err(CommandError::new)?;
        }
        if create.format == Format::Qcow2 {
            disk_options::take_qcow2(&mut options, create).map_err(CommandError::new)?;
        }
        if create.format == Format::Vmdk
            && let Some(name) = options.take("backing_file")
        {
            let format = options.take("backing_fmt");
            if create.backing.is_some() || format.is_some_and(|format| format != "vmdk") {
                let message = "the backing file of a VMDK is given once, and is a VMDK too";
                return Err(CommandError::new(message));
            }
            create.backing = Some((name.into(), Format::Vmdk));
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

/// Refuses a value that is given both in a list of options and by an option of its own.
pub(super) fn refuse_twice(options: &KeyValues, flags: &[&str]) -> Result<(), CommandError> {
    let key = |flag: &str| flag.trim_start_matches('-').replace('-', "_");
    let mut both = flags.iter().map(|flag| (flag, key(flag)));
    match both.find(|(_, key)| options.clone().take(key).is_some()) {
        None => Ok(()),
        Some((flag, key)) => Err(CommandError::new(format!(
            "{flag} and -o {key}= say the same; give only one of them"
        ))),
    }
}
