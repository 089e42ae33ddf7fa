//! The lists of `-o`: the properties of new images.

use std::ffi::OsString;
use std::fmt::Write as _;

use imgfmt::{CompressionType, CreateOptions, DataFile, Format, L2Entries, LazyRefcounts, VhdSize};
use nbd_jobs::key_values::KeyValues;
use nbd_jobs::qemu_numbers::parse_size;
use nbd_jobs::text::printable;
use nbd_jobs::{disk_options, foreign_options};

use super::arguments::parse_format;
use super::encryption::{self, Encrypted};
use super::place::{remotes, trusting};
use super::refusal::Refusal;
use super::secrets::Secrets;
use crate::signals;

/// QEMU's disks consist of these, in bytes.
pub(super) const SECTOR: u64 = 512;

/// The options of each format, for `-o help`.
const RAW_OPTIONS: &[(&str, &str)] = &[
    ("nocow=<bool (on/off)>", "Only off"),
    ("preallocation=<str>", "Preallocation mode (allowed values: off, falloc, full)"),
    ("size=<size>", "Virtual disk size"),
];
const QCOW2_OPTIONS: &[(&str, &str)] = &[
    ("backing_file=<str>", "File name of a base image"),
    ("backing_fmt=<str>", "Image format of the base image"),
    ("cluster_size=<size>", "Size of a cluster"),
    ("compat=<str>", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    ("compression_type=<str>", "Compression of clusters: zlib or zstd"),
    ("data_file=<str>", "File name of a new external data file"),
    ("data_file_raw=<bool (on/off)>", "Whether the data file stays a valid raw image"),
    ("encrypt.format=<str>", "Encrypt the image: luks"),
    ("encrypt.iter-time=<num>", "Milliseconds that trying a passphrase takes"),
    ("encrypt.key-secret=<str>", "ID of the secret with the passphrase"),
    ("extended_l2=<bool (on/off)>", "Whether clusters have subclusters"),
    ("lazy_refcounts=<bool (on/off)>", "Whether refcounts may be updated late"),
    ("nocow=<bool (on/off)>", "Only off"),
    ("preallocation=<str>", "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    ("refcount_bits=<num>", "Width of a reference count entry in bits"),
    ("size=<size>", "Virtual disk size"),
];

const LUKS_OPTIONS: &[(&str, &str)] = &[
    ("iter-time=<num>", "Milliseconds that trying a passphrase takes"),
    ("key-secret=<str>", "ID of the secret with the passphrase"),
    ("preallocation=<str>", "Preallocation mode (allowed values: off, falloc, full)"),
];

/// The properties of a new image, and the words with which they are reported.
pub(super) struct NewImage {
    pub(super) create: CreateOptions,
    /// The values that were given as texts.
    compat: Option<String>,
    preallocation: Option<String>,
    nocow: bool,
    encrypted: Encrypted,
    /// What is reported of other programs' formats.
    said: Vec<(&'static str, String)>,
    /// `backing_file` and `backing_fmt`, which other options may override.
    backing: (Option<String>, Option<String>),
}

/// Returns the text for `-o help`, if that is wanted. As in QEMU, the title names the format if no
/// target is given.
pub(super) fn help(format: Format, lists: &[String], target: Option<&OsString>) -> Option<String> {
    let mut words = lists.iter().flat_map(|list| list.split(','));
    words.find(|word| matches!(*word, "help" | "?"))?;
    let options = match format {
        Format::Qcow2 => QCOW2_OPTIONS,
        Format::Raw => RAW_OPTIONS,
        Format::Luks => LUKS_OPTIONS,
        other => foreign_options::known(other),
    };
    let mut text = match target {
        Some(_) => "Supported options:\n".to_owned(),
        None => format!("Supported {format} options:\n"),
    };
    if !matches!(format, Format::Qcow2 | Format::Raw) {
        text.push_str("  size=<size>            - Virtual disk size\n");
    }
    for (option, meaning) in options {
        // A String takes everything.
        let _ = writeln!(text, "  {option:<22} - {meaning}");
    }
    Some(text)
}

impl NewImage {
    /// Reads the lists of a new image of this format; its size is that of the option `size`, if
    /// any.
    ///
    /// # Errors
    ///
    /// If an option is unknown, malformed or not supported.
    pub(super) fn new(
        format: Format,
        lists: &[String],
        secrets: &Secrets,
    ) -> Result<Self, Refusal> {
        let mut create = CreateOptions::new(format, 0);
        (create.size, create.give_up) = (None, || signals::caught().is_some());
        create.open.policy = trusting(&remotes());
        let mut new = Self {
            create,
            compat: None,
            preallocation: None,
            nocow: false,
            encrypted: Encrypted::default(),
            said: Vec::new(),
            backing: (None, None),
        };
        let mut options = KeyValues::parse(&lists.join(","), None).map_err(Refusal::new)?;
        new.take_common(&mut options)?;
        new.encrypted = encryption::take(format, &mut options, secrets)?;
        new.create.encryption.clone_from(&new.encrypted.key);
        match format {
            Format::Raw | Format::Luks => {}
            Format::Qcow2 => new.take_qcow2(&mut options)?,
            _ => {
                // Without an option, the geometry counts, as in QEMU.
                new.create.foreign.vhd_size = VhdSize::Geometry;
                if format == Format::Vmdk {
                    new.take_backing(&mut options);
                }
                let foreign = &mut new.create.foreign;
                let said = foreign_options::take(format, &mut options, foreign);
                new.said = said.map_err(Refusal::new)?;
            }
        }
        match options.left_over() {
            None => Ok(new),
            Some(key) => Err(Refusal::new(format!("Invalid parameter '{}'", printable(key)))),
        }
    }

    fn take_common(&mut self, options: &mut KeyValues) -> Result<(), Refusal> {
        self.create.size = take_size(options, "size")?;
        self.preallocation = options.take("preallocation");
        if let Some(name) = &self.preallocation {
            let found = disk_options::preallocation(name, self.create.format);
            self.create.preallocation = found.map_err(Refusal::new)?;
        }
        if let Some(nocow) = options.take_switch("nocow").map_err(Refusal::new)? {
            if nocow {
                return Err(Refusal::new(
                    "nocow=on is not supported; set the attribute of the directory with chattr +C",
                ));
            }
            self.nocow = true;
        }
        // A hint for file systems.
        take_size(options, "extent_size_hint").map(drop)
    }

    fn take_qcow2(&mut self, options: &mut KeyValues) -> Result<(), Refusal> {
        let create = &mut self.create;
        self.compat = options.get("compat").map(str::to_owned);
        disk_options::take_qcow2(options, create).map_err(Refusal::new)?;
        let is_raw = options.take_switch("data_file_raw").map_err(Refusal::new)?.unwrap_or(false);
        create.data_file = match (options.take("data_file"), is_raw) {
            (Some(name), true) => Some((name.into(), DataFile::Raw)),
            (Some(name), false) => Some((name.into(), DataFile::Plain)),
            (None, true) => return Err(Refusal::new("data-file-raw requires data-file")),
            (None, false) => None,
        };
        self.take_backing(options);
        Ok(())
    }

    fn take_backing(&mut self, options: &mut KeyValues) {
        self.backing = (options.take("backing_file"), options.take("backing_fmt"));
    }

    /// Sets the backing file: these options come before those in the lists.
    ///
    /// # Errors
    ///
    /// If its format is missing or unknown, or it is not supported.
    pub(super) fn set_backing(
        &mut self,
        name: Option<String>,
        format: Option<String>,
    ) -> Result<(), Refusal> {
        let (listed_name, listed_format) = std::mem::take(&mut self.backing);
        let (name, format) = match (name.or(listed_name), format.or(listed_format)) {
            (None, None) => return Ok(()),
            given => given,
        };
        if !matches!(self.create.format, Format::Qcow2 | Format::Vmdk) {
            let format = self.create.format;
            return Err(Refusal::new(format!(
                "Backing file not supported for file format '{format}'"
            )));
        }
        let Some(name) = name else {
            return Err(Refusal::new("Backing format cannot be used without backing file"));
        };
        if name.is_empty() {
            return Err(Refusal::new("Expected backing file name, got empty string"));
        }
        let Some(format) = format else {
            return Err(Refusal::new("Backing file specified without backing format"));
        };
        self.create.backing = Some((name.into(), parse_format(&format)?));
        Ok(())
    }

    /// Refuses a backing file, for commands that make none.
    ///
    /// # Errors
    ///
    /// If there is one.
    pub(super) fn refuse_backing(&self) -> Result<(), Refusal> {
        match &self.backing {
            (None, None) => Ok(()),
            _ => Err(Refusal::new("backing_file and backing_fmt are not supported here")),
        }
    }

    fn report_backing(&self, add: &mut dyn FnMut(&str, &str)) {
        if let Some((name, format)) = &self.create.backing {
            add("backing_file", &name.to_string_lossy());
            add("backing_fmt", format.name());
        }
    }

    /// The line that reports them.
    pub(super) fn report(&self, name: &str, size: u64) -> String {
        let create = &self.create;
        let mut line = format!("Formatting '{}', fmt={}", printable(name), create.format);
        let mut add = |key: &str, value: &str| {
            // As in the lists, a comma in a value is doubled.
            let _ = write!(line, " {key}={}", printable(value).replace(',', ",,"));
        };
        let is_qcow2 = create.format == Format::Qcow2;
        if is_qcow2 {
            self.encrypted.said.iter().for_each(|(key, value)| add(key, value));
            add("cluster_size", &create.cluster_size.to_string());
            add("extended_l2", on_off(create.l2_entries == L2Entries::Extended));
            self.preallocation.iter().for_each(|text| add("preallocation", text));
            add(
                "compression_type",
                match create.compression {
                    CompressionType::Zlib => "zlib",
                    CompressionType::Zstd => "zstd",
                },
            );
        }
        add("size", &size.to_string());
        if is_qcow2 {
            self.compat.iter().for_each(|text| add("compat", text));
            if let Some((name, kind)) = &create.data_file {
                add("data_file", &name.to_string_lossy());
                if *kind == DataFile::Raw {
                    add("data_file_raw", "on");
                }
            }
            self.report_backing(&mut add);
            add("lazy_refcounts", on_off(create.lazy_refcounts == LazyRefcounts::On));
            add("refcount_bits", &create.refcount_bits.to_string());
        }
        for (key, value) in &self.said {
            // Where QEMU has it.
            if *key == "compat6" {
                self.report_backing(&mut add);
            }
            add(key, value);
        }
        if !is_qcow2 {
            self.encrypted.said.iter().for_each(|(key, value)| add(key, value));
        }
        if self.nocow {
            add("nocow", "off");
        }
        if !is_qcow2 {
            self.preallocation.iter().for_each(|text| add("preallocation", text));
        }
        line
    }
}

fn on_off(is_on: bool) -> &'static str {
    if is_on { "on" } else { "off" }
}

/// Removes a size from a list.
///
/// # Errors
///
/// If it is not a size.
pub(super) fn take_size(options: &mut KeyValues, key: &str) -> Result<Option<u64>, Refusal> {
    disk_options::take_size(options, key).map_err(Refusal::new)
}

/// Parses a size on the command line.
///
/// # Errors
///
/// If it is not a size; `what` names it.
pub(super) fn size_argument(what: &str, text: &str) -> Result<u64, Refusal> {
    match parse_size(text).filter(|size| i64::try_from(*size).is_ok()) {
        Some(size) => Ok(size),
        None => Err(Refusal::new(format!("Invalid {what} specified: '{}'.", printable(text)))),
    }
}
