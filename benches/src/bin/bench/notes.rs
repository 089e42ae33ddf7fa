//! Parts of a run that were skipped, with reasons.

use super::ending;

/// Reports an omission on the terminal, and keeps it for the report.
pub(crate) fn note(notes: &mut Vec<String>, text: String) {
    ending::stop_if_ending();
    eprintln!("bench: {text}");
    notes.push(text);
}
