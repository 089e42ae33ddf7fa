//! What had to be left out of a run, and why.

use super::ending;

/// Says on the terminal what had to be left out, and keeps it for the report.
pub(crate) fn note(notes: &mut Vec<String>, text: String) {
    ending::stop_if_ending();
    eprintln!("bench: {text}");
    notes.push(text);
}
