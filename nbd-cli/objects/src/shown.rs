//! The text of stores, made fit for messages.

/// Longest text of a store in a message, in characters.
const SHOWN_MAX: usize = 300;

/// Returns the code and message of an error of S3, and nothing for other texts.
pub(crate) fn summary(text: &str) -> String {
    let element = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        let (content, _) = rest.split_once("</")?;
        Some(content.trim()).filter(|content| !content.is_empty())
    };
    let summary = match (element("Code"), element("Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code.to_owned(),
        (None, _) => return String::new(),
    };
    shown(&summary).trim_end_matches('.').to_owned()
}

/// Returns a text without control characters, numbers of errors, and what is too long.
pub(crate) fn shown(text: &str) -> String {
    let text = text.split(" (os error ").next().unwrap_or_default();
    printable(text).take(SHOWN_MAX).collect()
}

/// The characters of a text, with blanks for those that control terminals or cannot be seen.
pub(crate) fn printable(text: &str) -> impl Iterator<Item = char> {
    text.chars().map(|char| if imgfmt::is_plain(char) { char } else { ' ' })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signature_and_key_in_a_refusal_are_left_out() {
        let reply = "<Error><Code>SignatureDoesNotMatch</Code><Message>The signature\nis \
                     wrong.</Message><AWSAccessKeyId>AKIA</AWSAccessKeyId>\
                     <SignatureProvided>f00d</SignatureProvided></Error>";
        assert_eq!(summary(reply), "SignatureDoesNotMatch: The signature is wrong");
        assert_eq!(summary("<html>no S3</html>"), "");
        assert_eq!(summary("<Code>A"), "");
        assert_eq!(summary(&format!("<Code>{}</Code>", "x".repeat(5000))).len(), SHOWN_MAX);
    }
    #[test]
    fn text_of_others_controls_no_terminal_and_is_short() {
        assert_eq!(shown("a\x1b[2J\nb\u{202e}c\u{200f}"), "a [2J b c ");
        assert_eq!(shown("Not a directory (os error 20)"), "Not a directory");
        assert_eq!(shown(&"ü".repeat(5000)).chars().count(), SHOWN_MAX);
    }
}
