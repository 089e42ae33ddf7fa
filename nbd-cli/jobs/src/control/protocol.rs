//! What goes over the control socket.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Longest line in both directions, in bytes, without its end.
pub const MAX_LINE_LEN: usize = 64 << 10;

/// A request. Names are those of exports and of bitmaps in their images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
#[serde(deny_unknown_fields)]
pub enum Request {
    /// List exports with their bitmaps, and clients
    List {},
    /// Export a file, a device or memory:SIZE
    AddExport {
        /// Name of the new export.
        name: String,
        /// What to export.
        source: String,
        /// Refuse all writes.
        #[serde(default)]
        read_only: bool,
        /// Format of the image; detected unless given.
        #[serde(default)]
        format: Option<String>,
        /// Description shown to clients.
        #[serde(default)]
        description: Option<String>,
    },
    /// Take an export away and close its image
    RemoveExport {
        /// Name of the export.
        name: String,
        /// Cut the connections of clients that use it; without this it is kept then.
        #[serde(default)]
        on_use: OnUse,
    },
    /// Add a bitmap in which nothing is dirty
    BitmapAdd {
        /// Name of the export.
        export: String,
        /// Name of the new bitmap.
        bitmap: String,
        /// How much of the disk one bit stands for: a power of two from 512 to 2G.
        #[serde(default)]
        granularity: Option<u64>,
        /// Do not record changes yet.
        #[serde(default)]
        initial: InitialState,
    },
    /// Remove a bitmap
    BitmapRemove {
        /// Name of the export.
        export: String,
        /// Name of the bitmap.
        bitmap: String,
    },
    /// Forget what is dirty
    BitmapClear {
        /// Name of the export.
        export: String,
        /// Name of the bitmap.
        bitmap: String,
    },
    /// Start recording changes
    BitmapEnable {
        /// Name of the export.
        export: String,
        /// Name of the bitmap.
        bitmap: String,
    },
    /// Stop recording changes
    BitmapDisable {
        /// Name of the export.
        export: String,
        /// Name of the bitmap.
        bitmap: String,
    },
    /// Make dirty in one bitmap what is dirty in another
    BitmapMerge {
        /// Name of the export.
        export: String,
        /// Name of the bitmap that changes.
        bitmap: String,
        /// Name of the bitmap that stays.
        from: String,
    },
    /// Freeze a bitmap, begin it anew, and export the disk as it is at that moment
    // For reading only, with the frozen bits as the bitmap's. The moment lies between two writes.
    CheckpointStart {
        /// Name of the export.
        export: String,
        /// The bitmap; without one only the view is made.
        #[serde(default)]
        bitmap: Option<String>,
        /// Add the bitmap if there is none.
        #[serde(default)]
        if_missing: IfMissing,
        /// Name of the export that is the view [default: the export's with .checkpoint behind it].
        #[serde(default)]
        view: Option<String>,
        /// Begin a bitmap anew that cannot be relied on: for a full backup, which does not need
        /// what it has noted.
        #[serde(default)]
        if_unusable: IfUnusable,
        /// The backup (its UUID) upon which the one of this checkpoint is made: refused unless the
        /// bitmap began after it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        base: Option<String>,
        /// Go on where it is not known after which backup the bitmap began.
        #[serde(default)]
        trust_base: bool,
        /// When the checkpoint ends if nobody ends it.
        #[serde(default)]
        lifetime: Lifetime,
    },
    /// End a checkpoint: drop the frozen bits after a success, merge them back after a failure
    CheckpointEnd {
        /// Name of the export.
        export: String,
        /// Whether a backup was taken.
        outcome: Verdict,
    },
    /// End the server as SIGTERM does
    Shutdown {},
}

/// What becomes of clients of an export that is removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnUse {
    /// The export stays.
    #[default]
    Refuse,
    /// Their connections are cut.
    Disconnect,
}

/// Whether a new bitmap notes changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InitialState {
    /// It does.
    #[default]
    Enabled,
    /// It does not yet.
    Disabled,
}

/// What is done about a bitmap that is not there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IfMissing {
    /// The request fails.
    #[default]
    Fail,
    /// It is added, at the moment of the checkpoint.
    Add,
}

/// What is done about a bitmap that cannot be relied on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IfUnusable {
    /// The request fails.
    #[default]
    Fail,
    /// Everything counts as dirty before the checkpoint, and it begins anew there.
    BeginAnew,
}

/// When a checkpoint ends that nobody ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lifetime {
    /// With the server.
    #[default]
    Server,
    /// With the connection on which it was begun: whoever made it may be killed.
    Connection,
}

/// Whether a backup was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is complete.
    Success,
    /// It is not.
    Failure,
}

/// What is exported, and to whom.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Listing {
    /// All exports, views of checkpoints included.
    pub exports: Vec<ExportState>,
    /// All clients that have chosen an export.
    pub clients: Vec<ClientState>,
}

/// An export.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ExportState {
    /// Its name; empty for the default export.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// Whether all writes are refused.
    pub read_only: bool,
    /// How many clients have chosen it.
    pub clients: usize,
    /// Where it comes from; not for views.
    pub source: Option<String>,
    /// Each with `name`, `granularity`, `enabled`, either `dirty-bytes` or `problem`, and the UUID
    /// of the backup that it `began-after`, or `perhaps-began-after` if another program has had the
    /// image.
    pub bitmaps: Vec<Value>,
    /// The UUID of the disk; known since its first backup.
    #[serde(default)]
    pub disk: Option<String>,
    /// The checkpoint in progress: its `view`, its `bitmap`, and the `problem` if it is lost.
    pub checkpoint: Option<Value>,
}

/// A client that has chosen an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ClientState {
    /// Its number, which no other client gets.
    pub id: u64,
    /// Its address, as text.
    pub peer: String,
    /// Name of its export.
    pub export: String,
    /// Seconds since 1970.
    pub since: u64,
}

/// A checkpoint that has begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Begun {
    /// Name of the export that is the view.
    pub view: String,
    /// The bitmap whose bits the view has; none if it was added just now.
    pub bitmap: Option<String>,
    /// Why the bitmap could not be relied on, if it begins anew for that reason.
    #[serde(default)]
    pub begun_anew: Option<String>,
    /// The UUID of the backup that is to be made: if the checkpoint ends with success the bitmap
    /// began after it.
    #[serde(default)]
    pub backup: Option<String>,
    /// The UUID of the disk, if it has one.
    #[serde(default)]
    pub disk: Option<String>,
    /// Where the view can be read.
    pub uris: Vec<String>,
}

/// What kind of failure it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The request cannot be understood, or asks for what cannot be.
    InvalidRequest,
    /// There is no export or bitmap of that name.
    NotFound,
    /// There is one of that name already.
    AlreadyExists,
    /// Clients, a checkpoint or another program use it.
    InUse,
    /// Anything else.
    Failed,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of failure.
    pub kind: ErrorKind,
    /// One sentence for people.
    pub message: String,
}

impl Failure {
    /// A failure; `message` is the whole sentence.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

impl From<imgfmt::Error> for Failure {
    fn from(error: imgfmt::Error) -> Self {
        Self::from(&error)
    }
}

impl From<&imgfmt::Error> for Failure {
    fn from(error: &imgfmt::Error) -> Self {
        let kind = match error.kind() {
            imgfmt::ErrorKind::NotFound => ErrorKind::NotFound,
            imgfmt::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
            imgfmt::ErrorKind::InvalidInput => ErrorKind::InvalidRequest,
            imgfmt::ErrorKind::Busy => ErrorKind::InUse,
            _ => ErrorKind::Failed,
        };
        Self::new(kind, error.to_string())
    }
}

/// The line of a reply, with its end.
pub fn encode(reply: Result<Value, Failure>) -> Vec<u8> {
    let value = match reply {
        Ok(result) => json!({ "result": result }),
        Err(failure) => json!({ "error": failure }),
    };
    let mut line = value.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// Reads a request.
///
/// # Errors
///
/// A [`Failure`] that says what is wrong with it.
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

/// A sentence about a request, from what the library for JSON says about it.
fn what_is_wrong(members: &serde_json::Map<String, Value>, said: &str) -> String {
    let said = said.split(" at line ").next().unwrap_or_default().replace('`', "'");
    let named = |prefix: &str| {
        let rest = said.strip_prefix(prefix)?.strip_prefix('\'')?;
        rest.split('\'').next().map(str::to_owned)
    };
    let command = match members.get("command") {
        None => return r#"the request has no "command""#.to_owned(),
        Some(Value::String(command)) => command,
        Some(_) => return r#"the "command" of a request is a text"#.to_owned(),
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

    #[test]
    fn what_is_wrong_with_a_request_is_said_in_a_sentence() {
        for (line, words) in [
            ("nonsense", "a request is one line of JSON, and this is not JSON"),
            (r#"{"command":"list""#, "a request is one line of JSON, and this is not JSON"),
            ("[]", r#"a request is a JSON object such as {"command":"list"}"#),
            ("{}", r#"the request has no "command""#),
            (r#"{"command":5}"#, r#"the "command" of a request is a text"#),
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
                r#"{"command":"checkpoint-end","export":"a","outcome":"failure"}"#,
                Request::CheckpointEnd { export: name("a"), outcome: Verdict::Failure },
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
