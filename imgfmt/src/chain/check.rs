//! Checks of images: of qcow2 images their own one, of the other formats whether every block can
//! lie where the tables say.

use std::path::Path;
use std::sync::Arc;

use super::open::{format_of, open, sidecar_path};
use crate::access::Access;
use crate::backing_file::BackingFile;
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::formats;
use crate::layer::{Layer, Walk};
use crate::mapping::{Holes, Lookup, Mapping};
use crate::options::OpenOptions;
use crate::qcow2::{CheckReport, Purpose, Qcow2, Repair};
use crate::storage::Storage;
use crate::units::span;

/// Most findings that are described.
const MESSAGES_MAX: usize = 100;

/// Most findings after which the rest of an image is examined too: bounds the time.
const FINDINGS_MAX: u64 = 1 << 16;

/// The step after a finding in an image that tells no size of its blocks, in bytes.
const STEP: u64 = 64 << 10;

/// Checks an image by itself, without the files below it.
pub(crate) fn check_storage(
    storage: Arc<dyn Storage>,
    path: Option<&Path>,
    options: &OpenOptions,
    repair: Repair,
) -> Result<CheckReport> {
    let part = options.part_of(Arc::clone(&storage))?;
    let format = format_of(&*part, path, options)?;
    let is_unsupported = |detail: String| Err(Error::new(ErrorKind::Unsupported, "check", detail));
    match format {
        Format::Qcow2 => return check_qcow2(part, path, options, repair),
        Format::Raw => return is_unsupported("a raw image has no metadata to check".to_owned()),
        Format::Vhdx => {}
        Format::Vdi | Format::Vmdk if repair == Repair::None => {}
        _ => {
            let what = match repair {
                Repair::None => "only qcow2, VHDX, VMDK and VDI images are checked",
                _ => "only qcow2 and VHDX images are repaired",
            };
            return is_unsupported(format!("it is a {} image, and {what}", format.description()));
        }
    }
    let is_replayed = match (format, repair) {
        (Format::Vhdx, Repair::All) => formats::replay_log(&part, path)?,
        _ => false,
    };
    let alone = OpenOptions {
        access: Access::ReadOnly,
        format: Some(format),
        backing: BackingFile::Ignored,
        snapshot: None,
        ..options.clone()
    };
    let image = open(storage, path, &alone).map_err(|error| match error.kind() {
        ErrorKind::PolicyDenied => {
            let detail = "its disk lies in other files, which are not opened for a check here";
            Error::new(ErrorKind::Unsupported, "check", detail)
        }
        _ => error,
    })?;
    let (unit, _) = image.top.foreign_facts();
    let mut report = check_blocks(image.top.layer(), unit.unwrap_or(STEP).max(1))?;
    report.other_format = Some(format);
    report.corruptions_repaired = is_replayed.into();
    Ok(report)
}

fn check_qcow2(
    storage: Arc<dyn Storage>,
    path: Option<&Path>,
    options: &OpenOptions,
    repair: Repair,
) -> Result<CheckReport> {
    let options = OpenOptions { access: repair.access(), snapshot: None, ..options.clone() };
    let mut image = Qcow2::open(storage, sidecar_path(path, &options), &options, Purpose::Check)?;
    let report = image.check(repair)?;
    if report.corruptions_repaired > 0 {
        image.break_seal()?;
    }
    Ok(report)
}

/// Looks up every block of a disk of blocks of `unit` bytes.
fn check_blocks(layer: &dyn Layer, unit: u64) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let (mut position, end) = (0, layer.size());
    while position < end {
        let mut reached = position;
        let mut visit = |_: &dyn Layer, mapping: Mapping<'_>| {
            reached = mapping.range.end().bytes();
            Ok(true)
        };
        let mut walk = Walk::new(Holes::AsData, Lookup::MayRead, &mut visit);
        match layer.map(span(position, end), &mut walk) {
            Ok(_) => break,
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                report.corruptions += 1;
                if report.messages.len() < MESSAGES_MAX {
                    report.messages.push(error.to_string());
                }
            }
            Err(error) => return Err(error),
        }
        if report.corruptions == FINDINGS_MAX {
            report.messages.push(format!(
                "{FINDINGS_MAX} blocks are damaged; the rest of the disk is not examined"
            ));
            break;
        }
        position = (reached / unit).saturating_add(1).saturating_mul(unit);
    }
    Ok(report)
}
