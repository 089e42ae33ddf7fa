//! The lines of the control socket: replies are encoded, and requests decoded.

use serde_json::{Value, json};

use super::protocol::{ErrorKind, Failure, Request};
use crate::text::readable_json;

/// Returns the line of a reply, with its line feed.
pub fn encode(reply: Result<Value, Failure>) -> Vec<u8> {
    let value = match reply {
        Ok(result) => json!({ "result": result }),
        Err(failure) => json!({ "error": failure }),
    };
    let mut line = readable_json(&value.to_string()).into_bytes();
    line.push(b'\n');
    line
}

/// Parses a request.
///
/// # Errors
///
/// A [`Failure`] that describes the defect.
pub fn decode(line: &[u8]) -> Result<Request, Failure> {
    serde_json::from_slice(line).map_err(|error| {
        let why = match serde_json::from_slice(line) {
            Err(_) => "a request is one line of JSON, and this is not JSON".to_owned(),
            Ok(Value::Object(members)) => what_is_wrong(&members, &error.to_string()),
            Ok(_) => r#"a request is a JSON object such as {"command":"list"}"#.to_owned(),
        };
        Failure::new(ErrorKind::InvalidRequest, why)
    })
}

/// Rewrites a message of the JSON library as a sentence about the request.
fn what_is_wrong(members: &serde_json::Map<String, Value>, said: &str) -> String {
    let said = said.split(" at line ").next().unwrap_or_default().replace('`', "'");
    let named = |prefix: &str| {
        let rest = said.strip_prefix(prefix)?.strip_prefix('\'')?;
        rest.split('\'').next().map(str::to_owned)
    };
    let command = match members.get("command") {
        None => return r#"the request has no "command""#.to_owned(),
        Some(Value::String(command)) => command,
        Some(_) => return r#"the "command" of a request is a string"#.to_owned(),
    };
    let known = said.split_once(", expected ").map_or("", |(_, known)| known);
    if named("unknown variant ").is_some() && known.contains("'add-export'") {
        let known = known.trim_start_matches("one of ");
        return format!("there is no command '{command}'; there are {known}");
    }
    if let Some(field) = named("missing field ") {
        format!("the command '{command}' needs \"{field}\"")
    } else if let Some(field) = named("unknown field ") {
        format!("the command '{command}' has no \"{field}\"")
    } else if let Some(field) = named("duplicate field ") {
        format!("\"{field}\" is given twice")
    } else if let Some((found, wanted)) = said
        .strip_prefix("invalid type: ")
        .or_else(|| said.strip_prefix("invalid value: "))
        .and_then(|rest| rest.split_once(", expected "))
    {
        let wanted = if wanted == "u64" { "a number of bytes" } else { wanted };
        format!("the command '{command}' was given {found} where {wanted} is needed")
    } else if let Some(value) = named("unknown variant ") {
        format!("the command '{command}' does not know '{value}': it takes {known}")
    } else {
        format!("the command '{command}' cannot be carried out: {said}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::{IfMissing, IfUnusable, Lifetime, OnUse, Outcome};

    #[test]
    fn what_is_wrong_with_a_request_is_said_in_a_sentence() {
        for (line, words) in [
            ("nonsense", "a request is one line of JSON, and this is not JSON"),
            (r#"{"command":"list""#, "a request is one line of JSON, and this is not JSON"),
            ("[]", r#"a request is a JSON object such as {"command":"list"}"#),
            ("{}", r#"the request has no "command""#),
            (r#"{"command":5}"#, r#"the "command" of a request is a string"#),
            (
                r#"{"command":"nope"}"#,
                "there is no command 'nope'; there are 'list', 'add-export',",
            ),
            (r#"{"command":"list","x":1}"#, r#"the command 'list' has no "x""#),
            (r#"{"command":"add-export","name":"x"}"#, r#"'add-export' needs "source""#),
            (
                r#"{"command":"add-export","name":5,"source":"x"}"#,
                "'add-export' was given integer '5' where a string is needed",
            ),
            (
                r#"{"command":"bitmap-add","export":"a","bitmap":"b","granularity":-1}"#,
                "where a number of bytes is needed",
            ),
            (
                r#"{"command":"remove-export","name":"a","on-use":"x"}"#,
                "does not know 'x': it takes",
            ),
            (
                r#"{"command":"checkpoint-end","export":"a","outcome":"maybe"}"#,
                "does not know 'maybe': it takes",
            ),
        ] {
            let failure = decode(line.as_bytes()).unwrap_err();
            assert!(failure.message.contains(words), "{line}: {}", failure.message);
            assert!(!failure.message.contains(" line 1") && !failure.message.contains('`'));
        }
    }

    #[test]
    fn requests_are_read_as_they_are_written_in_the_documentation() {
        let name = |text: &str| text.to_owned();
        let restart = Request::CheckpointStart {
            export: name("a"),
            bitmap: Some(name("b")),
            if_missing: IfMissing::Fail,
            view: None,
            if_unusable: IfUnusable::Restart,
            base: None,
            trust_base: false,
            lifetime: Lifetime::Server,
        };
        for (line, request) in [
            (r#"{"command":"list"}"#, Request::List {}),
            (
                r#"{"command":"remove-export","name":"a","on-use":"disconnect"}"#,
                Request::RemoveExport { name: name("a"), on_use: OnUse::Disconnect },
            ),
            (
                r#"{"command":"checkpoint-start","export":"a","bitmap":"b","if-missing":"add"}"#,
                Request::CheckpointStart {
                    export: name("a"),
                    bitmap: Some(name("b")),
                    if_missing: IfMissing::Add,
                    view: None,
                    if_unusable: IfUnusable::Fail,
                    base: None,
                    trust_base: false,
                    lifetime: Lifetime::Server,
                },
            ),
            (
                r#"{"command":"checkpoint-start","export":"a","lifetime":"connection"}"#,
                Request::CheckpointStart {
                    export: name("a"),
                    bitmap: None,
                    if_missing: IfMissing::Fail,
                    view: None,
                    if_unusable: IfUnusable::Fail,
                    base: None,
                    trust_base: false,
                    lifetime: Lifetime::Connection,
                },
            ),
            (
                r#"{"command":"checkpoint-start","export":"a","bitmap":"b","if-unusable":"restart"}"#,
                restart.clone(),
            ),
            (
                r#"{"command":"checkpoint-start","export":"a","bitmap":"b","if-unusable":"begin-anew"}"#,
                restart,
            ),
            (
                r#"{"command":"checkpoint-end","export":"a","outcome":"failure"}"#,
                Request::CheckpointEnd { export: name("a"), outcome: Outcome::Failure },
            ),
        ] {
            assert_eq!(decode(line.as_bytes()), Ok(request.clone()), "{line}");
            let text = serde_json::to_vec(&request).unwrap();
            assert_eq!(decode(&text), Ok(request));
        }
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let deep = "[".repeat(10_000);
        for line in [
            "",
            "list",
            "{}",
            "[]",
            r#"{"command":"lists"}"#,
            r#"{"command":"list","more":1}"#,
            r#"{"command":"bitmap-add","export":"a"}"#,
            r#"{"command":"bitmap-add","export":"a","bitmap":"b","granularity":-1}"#,
            r#"{"command":"checkpoint-end","export":"a","outcome":"maybe"}"#,
            r#"{"command":"list"} {"command":"shutdown"}"#,
            deep.as_str(),
        ] {
            let failure = decode(line.as_bytes()).unwrap_err();
            assert_eq!(failure.kind, ErrorKind::InvalidRequest, "{line}");
        }
        assert!(decode(b"\xff\xfe").is_err());
    }
}
