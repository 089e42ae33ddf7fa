//! Text that is shown to users, and that others may have written.

use std::fmt;

/// Escapes the characters that control a terminal or the direction of text, or cannot be seen:
/// names are those of images, and their authors are not trusted.
pub(crate) struct Escaping<'a, 'f>(pub(crate) &'a mut fmt::Formatter<'f>);

impl fmt::Write for Escaping<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| match is_plain(c) {
            true => self.0.write_char(c),
            false => write!(self.0, "{}", c.escape_default()),
        })
    }
}

/// Returns whether a character shows itself, and nothing else: it does not control a terminal or
/// the direction of text, and is not invisible. Names are those of others and may lie.
#[must_use]
pub fn is_plain(character: char) -> bool {
    match character {
        ' '..='~' => true,
        // Ignored where text is shown, although they are letters and marks.
        '\u{34f}'
        | '\u{115f}'..='\u{1160}'
        | '\u{17b4}'..='\u{17b5}'
        | '\u{180b}'..='\u{180f}'
        | '\u{2800}'
        | '\u{3164}'
        | '\u{fe00}'..='\u{fe0f}'
        | '\u{ffa0}'
        | '\u{e0100}'..='\u{e01ef}' => false,
        _ => {
            // The standard library escapes everything that cannot be seen, and marks only at the
            // start of a text.
            let mut text = String::from("a");
            text.push(character);
            text.escape_debug().count() == 2
        }
    }
}
