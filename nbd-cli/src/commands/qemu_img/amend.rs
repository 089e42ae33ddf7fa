//! `qemu-img amend`.

use imgfmt::{Amendment, Image, KeyChange, LazyRefcounts, Qcow2Version};
use nbd_jobs::disk_options::not_accepted;
use nbd_jobs::key_values::KeyValues;
use nbd_jobs::text::printable;

use super::amend_keys;
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
  encrypt.state=<str>    - 'active' adds a passphrase, 'inactive' erases one
  encrypt.new-secret=<str> - ID of the secret with the new passphrase
  encrypt.old-secret=<str> - ID of the secret with the passphrase to erase
  encrypt.keyslot=<num>  - Key slot to fill or to erase
  encrypt.iter-time=<num> - Time to spend on trying the new passphrase, in milliseconds
";

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let lists = arguments.lists()?;
    if lists.is_empty() {
        return Err(Refusal::usage("Must specify options (-o)"));
    }
    if lists.iter().flat_map(|list| list.split(',')).any(|word| matches!(word, "help" | "?")) {
        return text::print(HELP);
    }
    let place =
        Place::new(arguments, arguments.only_operand()?, Opt::Format, Opt::Cache)?.not_shared();
    let (path, options) = place.file()?;
    let mut given = KeyValues::parse(&lists.join(","), None).map_err(Refusal::new)?;
    let keys = keys(arguments, &place, &mut given)?;
    let amendment = amendment(given)?;
    if let Some(size) = amendment.size
        && size < place.inspect()?.size
    {
        return Err(Refusal::new(format!(
            "size={size} would cut the disk off at its end; use 'resize --shrink' if that is meant"
        )));
    }
    let progress = Percentage::begin(arguments.wants_progress())?;
    let changed = keys.map(|change| Image::change_keys(path, &options, &change)).transpose();
    let amended = match (changed, amendment == Amendment::default()) {
        (Ok(Some(_)), true) => Ok(()),
        (Ok(_), _) => Image::amend(path, &options, &amendment),
        (Err(error), _) => Err(error),
    };
    progress.end_with(&amended);
    amended?;
    Ok(0)
}

/// The change of passphrases that the options ask for, if they do.
fn keys(
    arguments: &Arguments,
    place: &Place,
    given: &mut KeyValues,
) -> Result<Option<KeyChange>, Refusal> {
    let (path, options) = place.file()?;
    // What is wrong with the image is said when it is opened.
    let Ok(info) = Image::inspect_file(path, &options) else { return Ok(None) };
    let keys = amend_keys::take(info.format, given, &arguments.secrets)?;
    if keys.is_some() && arguments.has(Opt::Force) {
        return Err(Refusal::new(
            "--force is not supported for keys: a slot in use is never overwritten, and the last one is \
             never erased",
        ));
    }
    Ok(keys)
}

fn amendment(mut options: KeyValues) -> Result<Amendment, Refusal> {
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
                key if key.starts_with("encrypt.") =>
                    "of an encryption only state, new-secret, old-secret, keyslot and iter-time can be given",
                key if key.starts_with("encrypt") =>
                    "whether an image is encrypted cannot be changed",
                _ =>
                    "only compat, lazy_refcounts, refcount_bits and size of an image can be changed",
            }
        ))),
    }
}
