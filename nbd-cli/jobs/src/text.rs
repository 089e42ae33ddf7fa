//! Foreign text in messages.

use std::fmt::Write as _;

/// Removes the error numbers that the standard library appends to the system's texts.
pub fn without_error_numbers(mut message: String) -> String {
    const BEFORE: &str = " (os error ";
    while let Some(start) = message.find(BEFORE) {
        let rest = &message[start + BEFORE.len()..];
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        if digits == 0 || rest.as_bytes().get(digits) != Some(&b')') {
            break;
        }
        message.replace_range(start..start + BEFORE.len() + digits + 1, "");
    }
    message
}

/// Text of a server with control characters escaped: it must not control the terminal.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            // Writing to a string cannot fail.
            let _ = write!(shown, "{}", character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_system_errors_are_not_for_people() {
        for (message, plain) in [
            ("no: File exists (os error 17)", "no: File exists"),
            ("a (os error 2), b (os error 111)!", "a, b!"),
            ("(os error of mine) (os error x)", "(os error of mine) (os error x)"),
        ] {
            assert_eq!(without_error_numbers(message.to_owned()), plain);
        }
    }

    #[test]
    fn a_server_cannot_send_escape_sequences_to_the_terminal() {
        assert_eq!(printable("disk\u{1b}[2J\n é"), "disk\\u{1b}[2J\\n é");
    }
}
