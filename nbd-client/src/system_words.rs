//! Texts for system errors.

use std::io;

/// The system's text for an error, without the number that the standard library appends.
pub(crate) fn system_words(error: &io::Error) -> String {
    let text = error.to_string();
    let number = error.raw_os_error().map(|code| format!(" (os error {code})"));
    match number.and_then(|number| text.strip_suffix(&number)) {
        Some(words) => words.to_owned(),
        None => text,
    }
}
