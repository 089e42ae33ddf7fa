//! `qemu-img snapshot`.

use imgfmt::{Image, ImageInfo};
use nbd_jobs::key_values::KeyValues;
use nbd_jobs::text::printable;

use super::arguments::Arguments;
use super::known::Opt;
use super::place::Place;
use super::refusal::Refusal;
use super::text::snapshots;
use crate::output::Output;

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let actions = [Opt::List, Opt::CreateSnapshot, Opt::ApplySnapshot, Opt::DeleteSnapshot];
    if arguments.count(&actions) > 1 {
        return Err(Refusal::usage("Cannot mix '-l', '-a', '-c', '-d'"));
    }
    let place = Place::new(arguments, arguments.only_operand()?, Opt::Format, Opt::None)?;
    let changes = [
        (Opt::CreateSnapshot, "create"),
        (Opt::ApplySnapshot, "apply"),
        (Opt::DeleteSnapshot, "delete"),
    ];
    for (action, word) in changes {
        let Some(name) = arguments.text(action)? else { continue };
        let mut image = place.open_to_change()?;
        let changed = match action {
            Opt::CreateSnapshot => image.create_snapshot(&name),
            Opt::ApplySnapshot => image.apply_snapshot(&name),
            _ => {
                let id = id_of_name(&image, &name)?;
                image.delete_snapshot(&id)
            }
        };
        changed.map_err(|error| {
            Refusal::new(format!("Could not {word} snapshot '{}': {error}", printable(&name)))
        })?;
        image.close()?;
        return Ok(0);
    }
    let info = place.inspect()?;
    if let Some(qcow2) = info.qcow2.filter(|qcow2| !qcow2.snapshots.is_empty()) {
        let mut output = Output::new();
        snapshots(&qcow2.snapshots, &mut output)?;
        output.finish()?;
    }
    Ok(0)
}

/// Returns the id of the snapshot to delete: as in QEMU, only its name says which one.
fn id_of_name(image: &Image, name: &str) -> Result<String, Refusal> {
    only_match(&image.info()?, None, Some(name)).map_err(|why| {
        Refusal::new(format!("Could not delete snapshot '{}': {why}", printable(name)))
    })
}

/// Returns the id of the first snapshot of which every given part matches.
fn only_match(info: &ImageInfo, id: Option<&str>, name: Option<&str>) -> Result<String, String> {
    let snapshots = info.qcow2.as_ref().map_or(&[][..], |qcow2| &qcow2.snapshots);
    let found = snapshots.iter().find(|snapshot| {
        id.is_none_or(|id| snapshot.id == id) && name.is_none_or(|name| snapshot.name == name)
    });
    let Some(found) = found else { return Err("snapshot not found".to_owned()) };
    // It is looked up by its id, and a damaged table may have one twice.
    if snapshots.iter().filter(|other| other.id == found.id).count() > 1 {
        return Err(format!("several snapshots have its id '{}'", printable(&found.id)));
    }
    Ok(found.id.clone())
}

/// Returns the snapshot that `-l` selects, by id or else by name, or its id if it is selected by
/// `snapshot.id=ID,snapshot.name=NAME`.
///
/// # Errors
///
/// If the list is malformed, or no snapshot has all that it says.
pub(super) fn to_read(arguments: &Arguments, place: &Place) -> Result<Option<String>, Refusal> {
    let Some(text) = arguments.text(Opt::Snapshot)? else { return Ok(None) };
    if !text.starts_with("snapshot.") {
        return Ok(Some(text));
    }
    let mut options = KeyValues::parse(&text, None).map_err(Refusal::new)?;
    let (id, name) = (options.take("snapshot.id"), options.take("snapshot.name"));
    if (id.is_none() && name.is_none()) || options.left_over().is_some() {
        return Err(Refusal::new(format!("Invalid snapshot parameter '{}'", printable(&text))));
    }
    let info = place.inspect()?;
    let found = only_match(&info, id.as_deref(), name.as_deref());
    found.map(Some).map_err(|why| Refusal::new(format!("Failed to load snapshot: {why}")))
}
