//! Numbers and foreign text in messages.

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

const SUFFIXES: [&str; 7] = ["", "K", "M", "G", "T", "P", "E"];

/// A size with the largest suffix that keeps it exact: `8M`, `1025`, `3K`.
pub fn exact(bytes: u64) -> String {
    let mut number = bytes;
    let mut suffix = 0;
    while number != 0 && number.is_multiple_of(1024) && suffix + 1 < SUFFIXES.len() {
        number /= 1024;
        suffix += 1;
    }
    format!("{number}{}", SUFFIXES[suffix])
}

/// A size rounded for reading: `8.0 MiB`, `1.5 GiB`, `17 bytes`.
pub fn rounded(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut suffix = 1;
    while value >= 1024.0 && suffix + 1 < SUFFIXES.len() {
        value /= 1024.0;
        suffix += 1;
    }
    format!("{value:.1} {}iB", SUFFIXES[suffix])
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

    #[test]
    fn exact_sizes_have_the_largest_suffix() {
        let texts = [0, 1, 1023, 1024, 1025, 8 << 20, 1 << 62].map(exact);
        assert_eq!(texts, ["0", "1", "1023", "1K", "1025", "8M", "4E"]);
    }

    #[test]
    fn rounded_sizes_have_one_decimal() {
        assert_eq!(rounded(17), "17 bytes");
        assert_eq!(rounded(1536), "1.5 KiB");
        assert_eq!(rounded(u64::MAX), "16.0 EiB");
    }
}
