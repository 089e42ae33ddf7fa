//! The options of new images of other programs' formats, as QEMU writes them (`-o`).

use imgfmt::{ForeignOptions, Format, Subformat, VhdSize, VmdkAdapter};

use crate::key_values::KeyValues;
use crate::qemu_numbers::parse_size;
use crate::text::printable;

const VDI: &[(&str, &str)] =
    &[("static=<bool (on/off)>", "Whether every block has its place from the start")];
const VPC: &[(&str, &str)] = &[
    ("force_size=<bool (on/off)>", "Whether the disk has exactly the requested size"),
    ("subformat=<str>", "Type of the image: dynamic (default) or fixed"),
];
const VHDX: &[(&str, &str)] = &[
    ("block_size=<size>", "Size of a block: a power of two from 1M to 256M; 0 chooses one"),
    ("block_state_zero=<bool (on/off)>", "Whether blocks that are not stored are marked as zero"),
    ("log_size=<size>", "Size of the log, in whole MiB"),
    ("subformat=<str>", "Type of the image: dynamic (default) or fixed"),
];
const VMDK: &[(&str, &str)] = &[
    ("adapter_type=<str>", "The controller: ide (default), lsilogic, buslogic or legacyESX"),
    ("backing_file=<str>", "File name of a base image, a VMDK too"),
    ("backing_fmt=<str>", "Image format of the base image: vmdk"),
    ("compat6=<bool (on/off)>", "Whether the version of the hardware is 6"),
    ("hwversion=<str>", "The version of the hardware"),
    (
        "subformat=<str>",
        "Type of the image: monolithicSparse (default), monolithicFlat, twoGbMaxExtentSparse, \
         twoGbMaxExtentFlat or streamOptimized",
    ),
    ("toolsversion=<str>", "The version of the guest's tools"),
    ("zeroed_grain=<bool (on/off)>", "Whether grains may be marked as zeroed"),
];

/// Returns the options of a format, and what they mean.
#[must_use]
pub fn known(format: Format) -> &'static [(&'static str, &'static str)] {
    match format {
        Format::Vdi => VDI,
        Format::Vpc => VPC,
        Format::Vhdx => VHDX,
        Format::Vmdk => VMDK,
        _ => &[],
    }
}

/// Removes the options of a format from a list and sets them. Returns them with their values, and
/// those that have a value if none is given, in the order in which QEMU reports them.
///
/// # Errors
///
/// A sentence about an option whose value is not possible.
pub fn take(
    format: Format,
    options: &mut KeyValues,
    foreign: &mut ForeignOptions,
) -> Result<Vec<(&'static str, String)>, String> {
    let mut taken = Taken { options, said: Vec::new() };
    match format {
        Format::Vdi => {
            foreign.subformat = match taken.switch("static", Some("off"))? {
                true => Subformat::Fixed,
                false => Subformat::Dynamic,
            };
        }
        Format::Vpc => {
            foreign.subformat = taken.subformat()?;
            if taken.options.has_key("force_size") {
                foreign.vhd_size = match taken.switch("force_size", None)? {
                    true => VhdSize::Exact,
                    false => VhdSize::Geometry,
                };
            }
        }
        Format::Vhdx => {
            foreign.log_size = taken.size("log_size", 1 << 20)?;
            foreign.block_size = taken.size("block_size", 0)?.filter(|size| *size > 0);
            foreign.subformat = taken.subformat()?;
            foreign.absent_blocks = !taken.switch_or("block_state_zero", true)?;
        }
        Format::Vmdk => take_vmdk(&mut taken, foreign)?,
        _ => {}
    }
    Ok(taken.said)
}

fn take_vmdk(taken: &mut Taken<'_>, foreign: &mut ForeignOptions) -> Result<(), String> {
    foreign.adapter = match taken.text("adapter_type", None).as_deref() {
        None | Some("ide") => VmdkAdapter::Ide,
        Some("lsilogic") => VmdkAdapter::LsiLogic,
        Some("buslogic") => VmdkAdapter::BusLogic,
        Some("legacyESX") => VmdkAdapter::LegacyEsx,
        Some(other) => return Err(not_accepted("adapter_type", other)),
    };
    let is_version_6 = taken.switch("compat6", Some("off"))?;
    let version = taken.text("hwversion", Some("undefined"));
    foreign.hardware_version = match version.filter(|version| version != "undefined") {
        Some(_) if is_version_6 => {
            return Err("compat6 cannot be enabled with hwversion set".to_owned());
        }
        None if is_version_6 => Some("6".to_owned()),
        version => version,
    };
    foreign.tools_version = taken.text("toolsversion", None);
    let (subformat, is_split) = match taken.text("subformat", None).as_deref() {
        None | Some("monolithicSparse") => (Subformat::Dynamic, false),
        Some("monolithicFlat") => (Subformat::Fixed, false),
        Some("twoGbMaxExtentSparse") => (Subformat::Dynamic, true),
        Some("twoGbMaxExtentFlat") => (Subformat::Fixed, true),
        Some("streamOptimized") => (Subformat::StreamOptimized, false),
        Some(other) => return Err(not_accepted("subformat", other)),
    };
    (foreign.subformat, foreign.split_extents) = (subformat, is_split);
    foreign.zeroed_grains = taken.switch_or("zeroed_grain", false)?;
    Ok(())
}

/// Options that are removed from a list, with what is reported of them.
struct Taken<'o> {
    options: &'o mut KeyValues,
    said: Vec<(&'static str, String)>,
}

impl Taken<'_> {
    fn text(&mut self, key: &'static str, otherwise: Option<&str>) -> Option<String> {
        let value = self.options.take(key).or_else(|| otherwise.map(str::to_owned))?;
        self.said.push((key, value.clone()));
        Some(value)
    }

    fn switch(&mut self, key: &'static str, otherwise: Option<&str>) -> Result<bool, String> {
        let given = self.options.take_switch(key)?;
        let shown = given.map(|is_on| if is_on { "on" } else { "off" }).or(otherwise);
        self.said.extend(shown.map(|shown| (key, shown.to_owned())));
        Ok(given.unwrap_or(false))
    }

    fn switch_or(&mut self, key: &'static str, otherwise: bool) -> Result<bool, String> {
        match self.options.has_key(key) {
            true => self.switch(key, None),
            false => Ok(otherwise),
        }
    }

    fn size(&mut self, key: &'static str, otherwise: u64) -> Result<Option<u64>, String> {
        let Some(text) = self.options.take(key) else {
            self.said.push((key, otherwise.to_string()));
            return Ok(None);
        };
        let Some(size) = parse_size(&text) else {
            let text = printable(&text);
            return Err(format!("Parameter '{key}' expects a size below 8E, not '{text}'"));
        };
        self.said.push((key, size.to_string()));
        Ok(Some(size))
    }

    fn subformat(&mut self) -> Result<Subformat, String> {
        match self.text("subformat", None).as_deref() {
            None | Some("dynamic") => Ok(Subformat::Dynamic),
            Some("fixed") => Ok(Subformat::Fixed),
            Some(other) => Err(not_accepted("subformat", other)),
        }
    }
}

fn not_accepted(key: &str, value: &str) -> String {
    format!("Parameter '{key}' does not accept value '{}'", printable(value))
}
