//! `qemu-img commit`.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use nbd_jobs::JobContext;
use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::overlay::{CommitBase, Committed, commit_overlay};

use super::arguments::Arguments;
use super::convert::rate;
use super::known::Opt;
use super::place::Place;
use super::progress::Percentage;
use super::refusal::Refusal;
use super::text;

/// Returns the file of a layer below. As in QEMU, a relative name starts at the directory of the
/// image above that layer, not at the working directory.
fn layer_named(place: &Place, name: &OsStr) -> Result<PathBuf, Refusal> {
    let file = |location: &ImageLocation| location.path().canonicalize().ok();
    for pair in place.layers()?.windows(2) {
        let named = file(&pair[0].location.beside(name)?);
        if named.is_some() && named == file(&pair[1].location) {
            return Ok(named.unwrap_or_default());
        }
    }
    Err(Refusal::new(format!(
        "'{}' is not a layer below '{}'",
        name.display(),
        place.location.name()
    )))
}

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let place =
        Place::new(arguments, arguments.only_operand()?, Opt::Format, Opt::Cache)?.not_shared();
    let (path, options) = place.file()?;
    let info = place.inspect()?;
    if info.qcow2.is_none() && info.backing_name.is_some() {
        let format = info.format;
        return Err(Refusal::new(format!("only qcow2 images can be committed, not '{format}'")));
    }
    let Some(backing) = info.qcow2.and_then(|qcow2| qcow2.backing_name) else {
        return Err(Refusal::new("Image does not have a backing file"));
    };
    // With a base, as in QEMU, the overlay stays as it is.
    let mut committed = Committed::Emptied;
    let mut base: Option<PathBuf> = None;
    if let Some(name) = arguments.value(Opt::Base) {
        if name != backing {
            base = Some(layer_named(&place, name)?);
        }
        committed = Committed::Kept;
    }
    if arguments.has(Opt::Drop) {
        committed = Committed::Kept;
    }
    let base = base.as_deref().map_or(CommitBase::Backing, |file: &Path| CommitBase::File(file));
    let rate_limit = rate(arguments)?;
    let progress = Percentage::begin(arguments.wants_progress())?;
    let context = JobContext { rate_limit, ..progress.context() };
    let result = commit_overlay(path, base, &options, committed, &place.remotes, &context);
    progress.end_with(&result);
    result?;
    if !arguments.has(Opt::Quiet) {
        text::print("Image committed.\n")?;
    }
    Ok(0)
}
