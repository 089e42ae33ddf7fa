//! `nbd-cli control`: inspect and control a running server.

mod command;

use std::ffi::OsStr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::Args;
use nbd_jobs::qemu_name::{is_name_of_server, json_in, path_in};
use nbd_jobs::size::{exact, parse_limit, rounded};
use serde_json::Value;

use self::command::ControlCommand;
use crate::error::{CommandError, Outcome};
use crate::output::{Output, ReportFormat, printable};
use nbd_jobs::control::{
    self, CheckpointStarted, Listing, Request, StreamPhase, StreamState, Traffic,
};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli serve --control /run/nbd.control --socket /run/nbd.sock vm=disk.qcow2
  nbd-cli control /run/nbd.control list
  nbd-cli control /run/nbd.control bitmap-add vm daily
  nbd-cli control /run/nbd.control add-export data /dev/vg/data
  nbd-cli control /run/nbd.control checkpoint-start vm --bitmap daily
  nbd-cli control /run/nbd.control checkpoint-end vm success
  nbd-cli control /run/nbd.control stream vm --rate 50M

Programs can use the socket themselves: one JSON object per line and one per reply, for example
  {\"command\":\"bitmap-add\",\"export\":\"vm\",\"bitmap\":\"daily\"}
  {\"result\":{}}
or {\"error\":{\"kind\":\"not-found\",\"message\":\"…\"}}. Fields have the names of the arguments here.
The default export of `serve disk.qcow2` has the empty name, written ''.";

/// Seconds without progress from which on a stream says so: what it reads may hang.
const IDLE_SHOWN: u64 = 5;

/// Arguments of `nbd-cli control`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ControlArgs {
    /// The socket that `serve --control` listens on.
    pub socket: PathBuf,

    /// The request.
    #[command(subcommand)]
    pub(crate) command: ControlCommand,

    /// Print the result as JSON.
    #[arg(long, global = true)]
    pub json: bool,

    /// Time limit for the answer: seconds, or 500ms, 10m; 0 for none. The server may carry out the
    /// request even if its answer comes too late.
    #[arg(long, global = true, value_name = "TIME", default_value = "5m", value_parser = parse_limit)]
    pub timeout: Duration,
}

pub(crate) fn run(args: &ControlArgs) -> Result<Outcome, CommandError> {
    let request = prepared(args.command.clone().into())?;
    let result = control::call(&args.socket, &request, args.timeout)?;
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json => output.json(&result)?,
        ReportFormat::Text => print(&request, result, &mut output)?,
    }
    output.finish()?;
    Ok(Outcome::Success)
}

/// Returns the request, in which the path of an export's source is absolute.
fn prepared(mut request: Request) -> Result<Request, CommandError> {
    if let Request::AddExport { source, .. } = &mut request {
        *source = absolute(source)?;
    }
    Ok(request)
}

/// The server may have another working directory.
fn absolute(source: &str) -> Result<String, CommandError> {
    // What a description names is relative to the server's directory.
    let is_described = json_in(source).is_some();
    if source.starts_with("memory:") || is_described || is_name_of_server(source) {
        return Ok(source.to_owned());
    }
    let path = std::path::absolute(path_in(OsStr::new(source)))
        .map_err(|error| CommandError::new(format!("cannot find '{source}': {error}")))?;
    path.to_str()
        .map(ToOwned::to_owned)
        .ok_or_else(|| CommandError::new(format!("'{}' is not valid UTF-8", path.display())))
}

fn print(request: &Request, result: Value, output: &mut Output) -> Result<(), CommandError> {
    let unclear = |_: serde_json::Error| {
        CommandError::new("the server's reply cannot be parsed; use the same version on both sides")
    };
    match request {
        Request::List {} => {
            print_listing(&serde_json::from_value(result).map_err(unclear)?, output)
        }
        Request::CheckpointStart { .. } => {
            let started: CheckpointStarted = serde_json::from_value(result).map_err(unclear)?;
            started.uris.iter().try_for_each(|uri| output.line(&printable(uri)))
        }
        Request::Stream { .. } => {
            let state: StreamState = serde_json::from_value(result).map_err(unclear)?;
            output.line(&format!("stream {}", stream_in_words(&state)))
        }
        Request::AddExport { .. } => {
            let uris = result.get("uris").and_then(Value::as_array);
            let uris = uris.into_iter().flatten().filter_map(Value::as_str);
            uris.into_iter().try_for_each(|uri| output.line(&printable(uri)))
        }
        _ => Ok(()),
    }
}

/// The requests of a client, or of all clients of an export.
fn in_words(since: Option<u64>, traffic: &Traffic) -> String {
    let zeroed = match traffic.bytes_zeroed {
        0 => String::new(),
        bytes => format!(", {} zeroed", rounded(bytes)),
    };
    let in_flight = match traffic.in_flight {
        0 => String::new(),
        count => format!(", in flight: {count}"),
    };
    format!(
        "for {}: requests: {}, errors: {}, {} read, {} written{zeroed}{in_flight}",
        since.map_or_else(|| "an unknown time".to_owned(), age),
        traffic.requests,
        traffic.errors,
        rounded(traffic.bytes_read),
        rounded(traffic.bytes_written),
    )
}

/// The time since a number of seconds since 1970, in words.
fn age(since: u64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seconds = now.map_or(0, |now| now.as_secs()).saturating_sub(since);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

fn stream_in_words(stream: &StreamState) -> String {
    let problem = stream.problem.as_deref().map(|why| format!(": {}", printable(why)));
    let phase = match stream.phase {
        StreamPhase::Running => "running",
        StreamPhase::Paused => "paused, and tried again",
        StreamPhase::Complete => "complete",
        StreamPhase::Cancelled => "cancelled",
        StreamPhase::Failed => "failed",
        _ => "in an unknown state",
    };
    let (done, total) = (rounded(stream.done), rounded(stream.total));
    let idle = stream.idle.filter(|seconds| *seconds >= IDLE_SHOWN);
    let idle = idle.map(|seconds| format!(", nothing copied for {seconds} s")).unwrap_or_default();
    format!("{phase}, {done} of {total}{idle}{}", problem.unwrap_or_default())
}

fn print_listing(listing: &Listing, output: &mut Output) -> Result<(), CommandError> {
    for export in &listing.exports {
        let access = if export.read_only { ", read-only" } else { "" };
        let source = export.source.as_deref().map(|source| format!(": {}", printable(source)));
        output.line(&format!(
            "'{}'{}, {}{access}, clients: {}",
            printable(&export.name),
            source.unwrap_or_default(),
            rounded(export.size),
            export.clients
        ))?;
        output.line(&format!("  {}", in_words(export.since, &export.traffic)))?;
        if let Some(problem) = &export.problem {
            output.line(&format!("  {}", printable(problem)))?;
        }
        for bitmap in &export.bitmaps {
            let text = |field: &str| bitmap.get(field).and_then(Value::as_str).unwrap_or_default();
            let number = |field: &str| bitmap.get(field).and_then(Value::as_u64);
            let state = match number("dirty-bytes") {
                Some(bytes) => format!("{} dirty", rounded(bytes)),
                None => printable(text("problem")),
            };
            let enabled = bitmap.get("enabled").and_then(Value::as_bool).unwrap_or_default();
            output.line(&format!(
                "  bitmap '{}', {}, granularity {}: {state}",
                printable(text("name")),
                if enabled { "enabled" } else { "disabled" },
                exact(number("granularity").unwrap_or_default()),
            ))?;
        }
        if let Some(stream) = &export.stream {
            output.line(&format!("  stream {}", stream_in_words(stream)))?;
        }
        if let Some(checkpoint) = &export.checkpoint {
            let text = |field: &str| checkpoint.get(field).and_then(Value::as_str);
            let problem = text("problem").map(|why| format!(", lost: {}", printable(why)));
            output.line(&format!(
                "  checkpoint in progress, view '{}'{}",
                printable(text("view").unwrap_or_default()),
                problem.unwrap_or_default()
            ))?;
        }
    }
    for client in &listing.clients {
        output.line(&format!(
            "client {} of '{}' from {}",
            client.id,
            printable(&client.export),
            printable(client.address.as_ref().unwrap_or(&client.peer))
        ))?;
        output.line(&format!("  {}", in_words(Some(client.since), &client.traffic)))?;
    }
    if let Some(since) = listing.since {
        output.line(&format!("The server has run for {}.", age(since)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    #[test]
    fn a_stream_that_copies_nothing_says_for_how_long() {
        for (idle, said) in [(3, ""), (17, ", nothing copied for 17 s")] {
            let text = format!(r#"{{"phase":"running","done":1024,"total":2048,"idle":{idle}}}"#);
            let state = serde_json::from_str(&text).unwrap();
            assert_eq!(stream_in_words(&state), format!("running, 1.0 KiB of 2.0 KiB{said}"));
        }
    }

    #[test]
    fn the_command_line_says_what_goes_over_the_socket() {
        for (words, json) in [
            ("list", r#"{"command":"list"}"#),
            ("remove-export a", r#"{"command":"remove-export","name":"a","on-use":"refuse"}"#),
            (
                "remove-export a --disconnect",
                r#"{"command":"remove-export","name":"a","on-use":"disconnect"}"#,
            ),
            (
                "bitmap-add a b --disabled -g 64K",
                r#"{"command":"bitmap-add","export":"a","bitmap":"b","granularity":65536,
                    "initial":"disabled"}"#,
            ),
            (
                "add-export a memory:1M -r -f raw",
                r#"{"command":"add-export","name":"a","source":"memory:1M","read-only":true,
                    "format":"raw","description":null}"#,
            ),
            (
                "checkpoint-start a --bitmap b --add-bitmap",
                r#"{"command":"checkpoint-start","export":"a","bitmap":"b","if-missing":"add",
                    "if-unusable":"fail","trust-base":false,"view":null,"lifetime":"server"}"#,
            ),
            (
                "stream a --base b --rate 1M",
                r#"{"command":"stream","export":"a","base":"b","rate":1048576,"action":"start"}"#,
            ),
            (
                "stream a --cancel",
                r#"{"command":"stream","export":"a","base":null,"rate":null,"action":"cancel"}"#,
            ),
            (
                "checkpoint-end a failure",
                r#"{"command":"checkpoint-end","export":"a","outcome":"failure"}"#,
            ),
        ] {
            let all = ["nbd-cli", "control", "/s"].into_iter().chain(words.split(' '));
            let Command::Control(args) = Cli::try_parse_from(all).unwrap().command else {
                panic!("another command")
            };
            let found = serde_json::to_value(prepared(args.command.into()).unwrap()).unwrap();
            assert_eq!(found, serde_json::from_str::<Value>(json).unwrap(), "{words}");
        }
    }
}
