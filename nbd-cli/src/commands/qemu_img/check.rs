//! `qemu-img check`.

use imgfmt::{BackingFile, CheckReport, Format, Repair};
use nbd_jobs::image_check::{CheckSummary, Checked, EXIT_CODE_UNSUPPORTED, Verdict, check};
use nbd_jobs::text::printable;

use super::arguments::Arguments;
use super::known::Opt;
use super::place::Place;
use super::refusal::{Refusal, complain};
use super::text::json;
use crate::output::{Output, ReportFormat, unless_closed};

pub(super) fn run(arguments: &Arguments) -> Result<u8, Refusal> {
    let repair = match arguments.text(Opt::Repair)?.as_deref() {
        None => Repair::None,
        Some("leaks") => Repair::Leaks,
        Some("all") => Repair::All,
        Some(other) => {
            return Err(Refusal::usage(format!(
                "--repair (-r) expects 'leaks' or 'all' not '{}'",
                printable(other)
            )));
        }
    };
    let format = arguments.output()?;
    let place = Place::new(arguments, arguments.only_operand()?, Opt::Format, Opt::SourceCache)?;
    if repair != Repair::None {
        place.refuse_to_share()?;
    }
    if is_encrypted(&place) {
        // Only the key is checked here, and a backing file might be missing.
        let mut alone = place.options.clone();
        alone.backing = BackingFile::Ignored;
        drop(place.open_with(&alone)?);
    }
    let checked = check(&place.location, &place.options, repair, &place.remotes);
    let report = match checked.map_err(|error| place.failed(&error))? {
        Checked::Examined(report) => report,
        Checked::Unsupported(why) => {
            let info = place.location.inspect(&place.options, &place.remotes);
            let said = "This image format does not support checks";
            match info {
                // Scripts look for exactly this line.
                Ok(info) if info.format != Format::Qcow2 => complain(said),
                _ => complain(&format!("{said}: {why}")),
            }
            return Ok(EXIT_CODE_UNSUPPORTED);
        }
    };
    for message in &report.messages {
        complain(&printable(message));
    }
    let is_quiet = arguments.has(Opt::Quiet);
    let mut output = Output::new();
    let printed = match format {
        ReportFormat::Json => {
            let name = arguments.only_operand()?.to_string_lossy().into_owned();
            json(&CheckSummary::new(name, &report), &mut output)
        }
        ReportFormat::Text if is_quiet => Ok(()),
        ReportFormat::Text => {
            lines(&report).iter().try_for_each(|line| output.line(line)).map_err(Refusal::from)
        }
    };
    // The exit code tells the result as well: a reader that has gone must not change it.
    if let Err(error) = printed
        && error.message.is_some()
    {
        return Err(error);
    }
    unless_closed(output.finish())?;
    Ok(Verdict::of(&report).exit_code())
}

/// Whether QEMU needs a key to check it.
fn is_encrypted(place: &Place) -> bool {
    // A server may end after the first connection, and nothing of it is decrypted.
    !place.location.is_remote()
        && place
            .location
            .inspect(&place.options, &place.remotes)
            .is_ok_and(|info| info.encryption.is_some())
}

fn lines(report: &CheckReport) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = |text: &str| lines.push(text.to_owned());
    if report.leaks_repaired + report.corruptions_repaired > 0 {
        line("The following inconsistencies were found and repaired:");
        line("");
        line(&format!("    {} leaked clusters", report.leaks_repaired));
        line(&format!("    {} corruptions", report.corruptions_repaired));
        line("");
        line("Double checking the fixed image now...");
    }
    if report.leaks + report.corruptions == 0 {
        line("No errors were found on the image.");
    }
    if report.corruptions > 0 {
        line("");
        line(&format!("{} errors were found on the image.", report.corruptions));
        line("Data may be corrupted, or further writes to the image may corrupt it.");
    }
    if report.leaks > 0 {
        line("");
        line(&format!("{} leaked clusters were found on the image.", report.leaks));
        line("This means waste of disk space, but no harm to data.");
    }
    let (total, allocated) = (report.total_clusters, report.allocated_clusters);
    if total > 0 && allocated > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        line(&format!(
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated),
        ));
    }
    if report.image_end_offset > 0 {
        line(&format!("Image end offset: {}", report.image_end_offset));
    }
    lines
}
