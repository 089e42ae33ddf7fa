//! Numbers on QEMU's command lines: integers in C's syntax, and sizes with suffixes.

/// Parses an integer like the C library's `strtol` with base 0: leading blanks, a sign, then
/// decimal digits, hexadecimal ones after `0x`, or octal ones after `0`. Nothing may follow.
///
/// Returns `None` if the text is something else or the number is negative or too large.
#[must_use]
pub fn parse_integer(text: &str) -> Option<u64> {
    let (sign, digits) = sign_and_rest(text)?;
    let number = match digits.as_bytes() {
        [b'0', b'x' | b'X', ..] => from_digits(&digits[2..], 16),
        [b'0', _, ..] => from_digits(&digits[1..], 8),
        _ => from_digits(digits, 10),
    }?;
    (sign == Sign::Plus || number == 0).then_some(number)
}

/// Parses a size: bytes in decimal or, after `0x`, in hexadecimal; or a decimal number, which may
/// have a fraction, before one of the suffixes B, K, M, G, T, P, E. Blanks and a plus may stand
/// before it. Digits may be missing on one side of the point.
///
/// Returns `None` if the text is something else, is not a number of whole bytes without such a
/// suffix, or is too large.
#[must_use]
pub fn parse_size(text: &str) -> Option<u64> {
    let (sign, text) = sign_and_rest(text)?;
    if sign == Sign::Minus {
        return None;
    }
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return from_digits(digits, 16);
    }
    let length = text.bytes().take_while(|byte| matches!(byte, b'0'..=b'9' | b'.')).count();
    let (number, suffix) = text.split_at(length);
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        "e" => 60,
        _ => return None,
    };
    let Some((whole, fraction)) = number.split_once('.') else {
        return from_digits(number, 10)?.checked_mul(1 << shift);
    };
    let mut digits = fraction.chars();
    if whole.len() + fraction.len() == 0 || !digits.all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    // A fraction of a byte is invalid.
    if shift == 0 && fraction.contains(|digit: char| digit != '0') {
        return None;
    }
    let whole = if whole.is_empty() { 0 } else { from_digits(whole, 10)? };
    let fraction = format!("0.{fraction}").parse::<f64>().ok()? * (1_u64 << shift) as f64;
    whole.checked_mul(1 << shift)?.checked_add(fraction as u64)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Sign {
    Plus,
    Minus,
}

/// Removes blanks and sign; returns `None` if nothing is left.
fn sign_and_rest(text: &str) -> Option<(Sign, &str)> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    let (sign, rest) = match text.as_bytes().first()? {
        b'+' => (Sign::Plus, &text[1..]),
        b'-' => (Sign::Minus, &text[1..]),
        _ => (Sign::Plus, text),
    };
    Some((sign, rest))
}

/// Digits and nothing else, at least one.
fn from_digits(digits: &str, radix: u32) -> Option<u64> {
    let first = digits.chars().next()?;
    first.is_digit(radix).then(|| u64::from_str_radix(digits, radix).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_read_as_the_c_library_reads_them() {
        for (text, number) in [
            ("2", Some(2)),
            (" 2", Some(2)),
            ("\t\n 2", Some(2)),
            ("+2", Some(2)),
            ("-0", Some(0)),
            ("010", Some(8)),
            ("0x200", Some(512)),
            (" 0X1f", Some(31)),
            ("0", Some(0)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("", None),
            (" ", None),
            ("-1", None),
            ("+ 2", None),
            ("++2", None),
            ("0x", None),
            ("0x+1", None),
            ("09", None),
            ("2 ", None),
            ("1M", None),
        ] {
            assert_eq!(parse_integer(text), number, "{text:?}");
        }
    }

    #[test]
    fn sizes_have_suffixes_of_powers_of_two() {
        for (text, size) in [
            ("0", Some(0)),
            ("512", Some(512)),
            (" 512", Some(512)),
            ("+512", Some(512)),
            ("010", Some(10)),
            ("1b", Some(1)),
            ("1M", Some(1 << 20)),
            ("1.5M", Some(3 << 19)),
            ("1.k", Some(1024)),
            ("2g", Some(2 << 30)),
            ("0x10", Some(16)),
            ("0x1k", None),
            ("", None),
            ("M", None),
            (".5M", Some(1 << 19)),
            ("+.5k", Some(512)),
            ("1024.0", Some(1024)),
            ("1024.00b", Some(1024)),
            ("512.", Some(512)),
            (".0", Some(0)),
            (".", None),
            (".k", None),
            ("1.5b", None),
            ("1.5.k", None),
            ("1.k5", None),
            ("1..5M", None),
            ("1kB", None),
            ("1e3", None),
            ("0.5", None),
            ("512 ", None),
            ("1X", None),
            ("-1", None),
            ("16E", None),
        ] {
            assert_eq!(parse_size(text), size, "{text:?}");
        }
    }
}
