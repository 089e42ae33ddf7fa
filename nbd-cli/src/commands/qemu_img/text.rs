//! Texts as qemu-img prints them: sizes for people, lists of snapshots, JSON.

use imgfmt::Snapshot;
use nbd_jobs::date::date_and_time;
use nbd_jobs::text::printable;
use serde::Serialize;
use serde_json::{Map, Value};

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

/// Writes a value as JSON in QEMU's lines: a member in each, in its order.
pub(super) fn json(value: &impl Serialize, output: &mut Output) -> Result<(), Refusal> {
    let value = serde_json::to_value(value).map_err(|error| CommandError::output(&error.into()))?;
    let mut text = String::new();
    add_json(&value, "\n", &mut text);
    output.line(&text)?;
    Ok(())
}

/// Adds a value to a text; `line` begins the lines of what it is in.
fn add_json(value: &Value, line: &str, text: &mut String) {
    let members = match value {
        Value::Object(members) => in_order(members),
        Value::Array(members) => members.iter().map(|member| ("", member)).collect(),
        _ => return text.push_str(&value.to_string()),
    };
    let (start, end) = if value.is_object() { ('{', '}') } else { ('[', ']') };
    text.push(start);
    let inner = format!("{line}    ");
    for (index, (key, member)) in members.into_iter().enumerate() {
        text.push_str(if index == 0 { "" } else { "," });
        text.push_str(&inner);
        if !key.is_empty() {
            text.push_str(&format!("\"{key}\": "));
        }
        add_json(member, &inner, text);
    }
    text.push_str(line);
    text.push(end);
}

/// The members of an object in QEMU's order.
fn in_order(members: &Map<String, Value>) -> Vec<(&str, &Value)> {
    let place = |key: &str| ORDER.iter().position(|other| *other == key).unwrap_or(ORDER.len());
    let mut members: Vec<_> = members.iter().map(|(key, value)| (key.as_str(), value)).collect();
    members.sort_by_key(|(key, _)| place(key));
    members
}

/// The order in which the members of objects are printed; others follow.
const ORDER: &[&str] = &[
    "children",
    "backing-filename-format",
    "snapshots",
    "icount",
    "vm-clock-nsec",
    "flags",
    "name",
    "info",
    "date-sec",
    "date-nsec",
    "vm-clock-sec",
    "id",
    "vm-state-size",
    "type",
    "data",
    "image-end-offset",
    "compressed-clusters",
    "total-clusters",
    "corruptions",
    "corruptions-fixed",
    "check-errors",
    "leaks",
    "leaks-fixed",
    "allocated-clusters",
    "cid",
    "parent-cid",
    "create-type",
    "extents",
    "compat",
    "compression-type",
    "lazy-refcounts",
    "bitmaps",
    "required",
    "fully-allocated",
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
    "compressed",
    "virtual-size",
    "filename",
    "cluster-size",
    "format",
    "fragmented-clusters",
    "cipher-mode",
    "slots",
    "payload-offset",
    "actual-size",
    "format-specific",
    "full-backing-filename",
    "backing-filename",
    "encrypted",
    "dirty-flag",
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
            for (key, value) in in_order(members) {
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
