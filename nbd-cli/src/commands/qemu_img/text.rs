//! Texts as qemu-img prints them: sizes for people, lists of snapshots, JSON.

use imgfmt::Snapshot;
use nbd_jobs::date::date_and_time;
use nbd_jobs::text::printable;
use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{PrettyFormatter, Serializer};

use super::refusal::Refusal;
use crate::error::CommandError;
use crate::output::Output;

/// Prints a text on standard output.
///
/// # Errors
///
/// If it cannot be written.
pub(super) fn print(text: &str) -> Result<u8, Refusal> {
    let mut output = Output::new();
    output.text(text)?;
    output.finish()?;
    Ok(0)
}

/// Three digits of a size and its unit, which changes before there are four: `0.977 KiB`.
pub(super) fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}B", three_digits(value), UNITS[unit])
}

/// A number below 1000 with three significant digits, without zeroes at the end.
fn three_digits(value: f64) -> String {
    let decimals = match value {
        _ if value >= 99.95 => 0,
        _ if value >= 9.995 => 1,
        _ if value >= 0.9995 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// Writes the table of snapshots with its title.
pub(super) fn snapshots(list: &[Snapshot], output: &mut Output) -> Result<(), CommandError> {
    output.line("Snapshot list:")?;
    output
        .line("ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT")?;
    for snapshot in list {
        let (seconds, rest) =
            (snapshot.vm_clock_ns / 1_000_000_000, snapshot.vm_clock_ns % 1_000_000_000);
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            rest / 1_000_000
        );
        let date = date_and_time(snapshot.date_s.into());
        let count = snapshot.instruction_count().map_or("--".to_owned(), |count| count.to_string());
        output.line(&format!(
            "{:<7} {:<16} {:>8} {:>19} {clock:>15} {count:>10}",
            printable(&snapshot.id),
            printable(&snapshot.name),
            human_size(snapshot.vm_state_size),
            date.trim_end_matches(" UTC"),
        ))?;
    }
    Ok(())
}

/// Writes a value as JSON, indented by four spaces.
pub(super) fn json(value: &impl Serialize, output: &mut Output) -> Result<(), Refusal> {
    let mut text = Vec::new();
    let formatter = PrettyFormatter::with_indent(b"    ");
    let mut serializer = Serializer::with_formatter(&mut text, formatter);
    let written = value.serialize(&mut serializer);
    written.map_err(|error| CommandError::output(&error.into()))?;
    output.line(&String::from_utf8_lossy(&text))?;
    Ok(())
}

/// The order in which the properties of a format are printed; others follow.
const ORDER: [&str; 22] = [
    "flags",
    "name",
    "compat",
    "compression-type",
    "lazy-refcounts",
    "bitmaps",
    "refcount-bits",
    "data-file",
    "data-file-raw",
    "encrypt",
    "corrupt",
    "extended-l2",
    "granularity",
    "ivgen-alg",
    "detached-header",
    "hash-alg",
    "cipher-alg",
    "uuid",
    "format",
    "cipher-mode",
    "slots",
    "payload-offset",
];

/// Writes the members of an object, one per line; those of members are indented further.
pub(super) fn properties(
    value: &Value,
    indentation: usize,
    output: &mut Output,
) -> Result<(), CommandError> {
    let blank = " ".repeat(indentation);
    match value {
        Value::Object(members) => {
            let place = |key: &str| ORDER.iter().position(|other| *other == key);
            let mut members: Vec<_> = members.iter().collect();
            members.sort_by_key(|(key, _)| place(key).unwrap_or(ORDER.len()));
            for (key, value) in members {
                property(
                    &format!("{blank}{}:", key.replace('-', " ")),
                    value,
                    indentation,
                    output,
                )?;
            }
        }
        Value::Array(members) => {
            for (index, value) in members.iter().enumerate() {
                property(&format!("{blank}[{index}]:"), value, indentation, output)?;
            }
        }
        _ => {}
    }
    Ok(())
}

fn property(
    title: &str,
    value: &Value,
    indentation: usize,
    output: &mut Output,
) -> Result<(), CommandError> {
    match value {
        Value::Object(_) | Value::Array(_) => {
            output.line(title)?;
            properties(value, indentation + 4, output)
        }
        Value::String(text) => output.line(&format!("{title} {}", printable(text))),
        other => output.line(&format!("{title} {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::human_size;

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (197_120, "192 KiB"),
            (1_610_612_736, "1.5 GiB"),
            (1023 << 20, "0.999 GiB"),
            (10_485_761, "10 MiB"),
            (12_345_678, "11.8 MiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human_size(bytes), text, "{bytes}");
        }
    }
}
