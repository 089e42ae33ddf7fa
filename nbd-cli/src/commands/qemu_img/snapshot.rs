//! `qemu-img snapshot`.

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
            _ => image.delete_snapshot(&name),
        };
        changed.map_err(|error| {
            Refusal::new(format!("Could not {word} snapshot '{name}': {error}"))
        })?;
        image.close()?;
        return Ok(0);
    }
    let info = place.location.inspect(&place.options, &place.remotes);
    let info = info.map_err(|error| place.not_opened(&error.to_string()))?;
    if let Some(qcow2) = info.qcow2.filter(|qcow2| !qcow2.snapshots.is_empty()) {
        let mut output = Output::new();
        snapshots(&qcow2.snapshots, &mut output)?;
        output.finish()?;
    }
    Ok(0)
}
