//! What a store says of a request that it refuses.
//!
//! The text goes into error messages, so it is cut to the code and the message of S3's errors. The
//! complete one can have the access key, the signature and the text that was signed.

use http_body_util::BodyExt as _;

use super::body::ReplyBody;

/// Longest reply that is looked at, in bytes.
const READ_MAX: usize = 64 * 1024;

/// Longest text, in characters.
const SHOWN_MAX: usize = 300;

/// Returns the code and message of an error of S3, and nothing for other replies.
pub(super) async fn summarised(mut body: ReplyBody) -> String {
    let mut text = Vec::new();
    while let Some(Ok(frame)) = body.frame().await {
        if let Ok(data) = frame.into_data() {
            text.extend_from_slice(&data[..data.len().min(READ_MAX - text.len())]);
        }
        if text.len() == READ_MAX {
            break;
        }
    }
    summary(&String::from_utf8_lossy(&text))
}

fn summary(text: &str) -> String {
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
    let printable = summary.chars().map(|char| if char.is_control() { ' ' } else { char });
    let shown: String = printable.take(SHOWN_MAX).collect();
    shown.trim_end_matches('.').to_owned()
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
}
