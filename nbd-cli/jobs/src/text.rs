//! Foreign text in messages.

use std::fmt::Write as _;

use nbd_proto::codec::is_plain;

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

/// A name or a text of others, with everything escaped that controls a terminal or the direction of
/// text, or cannot be seen.
pub fn printable(text: &str) -> String {
    replaced(text, is_plain, escape)
}

/// Text with names in it, such as a message, with everything escaped that controls the direction of
/// text or cannot be seen. What controls a terminal is the text's own.
pub fn readable(text: &str) -> String {
    replaced(text, is_control_or_plain, escape)
}

/// JSON with the same characters escaped: its value stays the same.
pub fn readable_json(text: &str) -> String {
    replaced(text, is_control_or_plain, |shown, character| {
        for unit in character.encode_utf16(&mut [0; 2]) {
            let _ = write!(shown, "\\u{unit:04x}");
        }
    })
}

fn is_control_or_plain(character: char) -> bool {
    character.is_control() || is_plain(character)
}

fn escape(shown: &mut String, character: char) {
    // Writing to a string cannot fail.
    let _ = write!(shown, "{}", character.escape_default());
}

fn replaced(text: &str, is_kept: fn(char) -> bool, replace: fn(&mut String, char)) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match is_kept(character) {
            true => shown.push(character),
            false => replace(&mut shown, character),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `imgfmt` and `nbd-proto` do not know each other, so each has a definition.
    #[test]
    fn characters_are_plain_in_names_of_images_as_in_those_of_exports() {
        for character in '\0'..=char::MAX {
            assert_eq!(imgfmt::is_plain(character), is_plain(character), "{character:?}");
        }
    }

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

    #[test]
    fn names_of_others_cannot_be_read_as_other_names() {
        assert_eq!(printable("gmi.\u{202e}2wocq\u{200f}"), "gmi.\\u{202e}2wocq\\u{200f}");
        assert_eq!(readable("a\n\u{1b}[1m\u{61c}b"), "a\n\u{1b}[1m\\u{61c}b");
        let name = "a\u{2067}\u{e0041}b\"\\é\n";
        let json = serde_json::to_string(name).expect("JSON");
        let shown = readable_json(&json);
        assert_eq!(shown, r#""a\u2067\udb40\udc41b\"\\é\n""#);
        assert_eq!(serde_json::from_str::<String>(&shown).expect("JSON"), name);
    }
}
