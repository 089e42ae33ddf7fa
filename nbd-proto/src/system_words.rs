//! Texts for errors of the system.

/// Returns the system's text for an error, without the number that the standard library appends.
///
/// ```
/// use nbd_proto::system_words::system_words;
///
/// let error = std::io::Error::from_raw_os_error(28);
/// assert_eq!(error.to_string(), "No space left on device (os error 28)");
/// assert_eq!(system_words(&error), "No space left on device");
/// ```
#[must_use]
pub fn system_words(error: &std::io::Error) -> String {
    let text = error.to_string();
    let number = error.raw_os_error().map(|code| format!(" (os error {code})"));
    match number.and_then(|number| text.strip_suffix(&number)) {
        Some(words) => words.to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Error;

    use super::*;

    #[test]
    fn a_number_that_is_not_the_systems_stays() {
        assert_eq!(system_words(&Error::other("no (os error 5)")), "no (os error 5)");
    }
}
