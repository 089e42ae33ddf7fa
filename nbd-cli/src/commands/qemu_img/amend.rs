//! `qemu-img amend`.

use imgfmt::{Amendment, Image, LazyRefcounts, Qcow2Version};
use nbd_jobs::disk_options::not_accepted;
use nbd_jobs::key_values::KeyValues;
use nbd_jobs::text::printable;

use super::arguments::Arguments;
use super::known::Opt;
use super::options::take_size;
use super::place::Place;
use super::progress::Percentage;
use super::refusal::Refusal;
use super::text;

const HELP: &str = "\
Amend options for 'qcow2':
  compat=<str>           - Compatibility level (v2 [0.10] or v3 [1.1])
  lazy_refcounts=<bool (on/off)> - Whether refcounts may be updated late
  refcount_bits=<num>    - Width of a reference count entry in bits
  size=<size>            - Virtual disk size; it can only grow
";

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let lists = arguments.lists()?;
    if lists.is_empty() {
        return Err(Refusal::usage("Must specify options (-o)"));
    }
    if lists.iter().flat_map(|list| list.split(',')).any(|word| matches!(word, "help" | "?")) {
        return text::print(HELP);
    }
    let place = Place::new(arguments, arguments.only_operand()?, Opt::Format, Opt::Cache)?;
    let (path, options) = place.file()?;
    let amendment = amendment(&lists)?;
    if let Some(size) = amendment.size {
        let info = Image::inspect_file(path, &options);
        let present = info.map_err(|error| place.not_opened(&error.to_string()))?.size;
        if size < present {
            return Err(Refusal::new(format!(
                "size={size} would cut the disk off at its end; use 'resize --shrink' if that is meant"
            )));
        }
    }
    let progress = Percentage::begin(arguments.wants_progress())?;
    let amended = Image::amend(path, &options, &amendment);
    progress.end_with(&amended);
    amended?;
    Ok(0)
}

fn amendment(lists: &[String]) -> Result<Amendment, Refusal> {
    let mut options = KeyValues::parse(&lists.join(","), None).map_err(Refusal::new)?;
    let mut amendment = Amendment::default();
    amendment.version = match options.take("compat").as_deref() {
        None => None,
        Some("1.1" | "v3") => Some(Qcow2Version::V3),
        Some("0.10" | "v2") => Some(Qcow2Version::V2),
        Some(other) => {
            return Err(Refusal::new(format!("Unknown compatibility level {}", printable(other))));
        }
    };
    let lazy = options.take_switch("lazy_refcounts").map_err(Refusal::new)?;
    amendment.lazy_refcounts =
        lazy.map(|is_on| if is_on { LazyRefcounts::On } else { LazyRefcounts::Off });
    if let Some(bits) = options.take("refcount_bits") {
        let number =
            bits.parse().map_err(|_| Refusal::new(not_accepted("refcount_bits", &bits)))?;
        amendment.refcount_bits = Some(number);
    }
    amendment.size = take_size(&mut options, "size")?;
    match options.left_over() {
        None => Ok(amendment),
        Some(key) => Err(Refusal::new(format!(
            "Invalid parameter '{}': {}",
            printable(key),
            match key {
                "backing_file" | "backing_fmt" => "the backing file is changed by 'rebase'",
                "data_file" | "data_file_raw" => "the data file of an image cannot be changed here",
                key if key.starts_with("encrypt") => "encrypted images cannot be changed here",
                _ =>
                    "only compat, lazy_refcounts, refcount_bits and size of an image can be changed",
            }
        ))),
    }
}
