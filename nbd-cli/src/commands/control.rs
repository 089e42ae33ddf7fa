//! `nbd-cli control`: look at a running server and change what it does.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::Value;

use super::serve::ImageFormat;
use crate::control::{self, Begun, IfMissing, InitialState, Listing, OnUse, Request, Verdict};
use crate::error::{CommandError, Outcome};
use crate::output::{Output, ReportFormat, printable};
use crate::size::{ByteSize, exact, rounded};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli serve --control /run/nbd.control --socket /run/nbd.sock vm=disk.qcow2
  nbd-cli control /run/nbd.control list
  nbd-cli control /run/nbd.control bitmap-add vm daily
  nbd-cli control /run/nbd.control add-export data /dev/vg/data
  nbd-cli control /run/nbd.control checkpoint-start vm --bitmap daily
  nbd-cli control /run/nbd.control checkpoint-end vm success

Programs can use the socket themselves: one JSON object per line and one per reply, for example
  {\"command\":\"bitmap-add\",\"export\":\"vm\",\"bitmap\":\"daily\"}
  {\"result\":{}}
or {\"error\":{\"kind\":\"not-found\",\"message\":\"…\"}}. Fields are named as the arguments here.
The default export of `serve disk.qcow2` has the empty name, written ''.";

/// Arguments of `nbd-cli control`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ControlArgs {
    /// The socket that `serve --control` listens on.
    pub socket: PathBuf,

    /// What to do.
    #[command(subcommand)]
    pub command: ControlCommand,

    /// Print the result as JSON.
    #[arg(long, global = true)]
    pub json: bool,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum ControlCommand {
    /// List exports with their bitmaps, and clients
    List,
    /// Export a file, a device or memory:SIZE
    AddExport {
        /// Name of the new export.
        name: String,
        /// What to export.
        source: PathBuf,
        /// Refuse all writes.
        #[arg(short, long)]
        read_only: bool,
        /// Format of the image; found by looking at it unless given.
        #[arg(short, long, value_enum)]
        format: Option<ImageFormat>,
        /// A text for people that clients can ask for.
        #[arg(short = 'D', long, value_name = "TEXT")]
        description: Option<String>,
    },
    /// Take an export away and close its image
    RemoveExport {
        /// Name of the export.
        name: String,
        /// Cut the connections of clients that use it; without this it is kept then.
        #[arg(long)]
        disconnect: bool,
    },
    /// Add a bitmap in which nothing is dirty
    BitmapAdd {
        /// Name of the export.
        export: String,
        /// Name of the new bitmap.
        bitmap: String,
        /// How much of the disk one bit stands for.
        #[arg(short, long, value_name = "SIZE")]
        granularity: Option<ByteSize>,
        /// Do not note changes yet.
        #[arg(long)]
        disabled: bool,
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
    /// Note changes from now on
    BitmapEnable {
        /// Name of the export.
        export: String,
        /// Name of the bitmap.
        bitmap: String,
    },
    /// Note no changes from now on
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
    CheckpointStart {
        /// Name of the export.
        export: String,
        /// The bitmap; without one only the view is made.
        #[arg(short = 'B', long, value_name = "NAME")]
        bitmap: Option<String>,
        /// Add the bitmap if there is none.
        #[arg(long, requires = "bitmap")]
        add_bitmap: bool,
        /// Name of the export that is the view [default: the export's with .checkpoint behind it].
        #[arg(long, value_name = "NAME")]
        view: Option<String>,
    },
    /// End a checkpoint: drop the frozen bits after a success, merge them back after a failure
    CheckpointEnd {
        /// Name of the export.
        export: String,
        /// Whether a backup was taken.
        #[arg(value_enum)]
        outcome: BackupOutcome,
    },
    /// End the server as SIGTERM does
    Shutdown,
}

/// How a backup ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BackupOutcome {
    /// It is complete.
    Success,
    /// It is not.
    Failure,
}

pub(crate) fn run(args: &ControlArgs) -> Result<Outcome, CommandError> {
    let result = control::call(&args.socket, &request(&args.command)?)?;
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json => output.json(&result)?,
        ReportFormat::Text => print(&args.command, result, &mut output)?,
    }
    output.finish()?;
    Ok(Outcome::Success)
}

fn request(command: &ControlCommand) -> Result<Request, CommandError> {
    Ok(match command.clone_names() {
        (ControlCommand::List, _) => Request::List {},
        (ControlCommand::AddExport { name, source, read_only, format, description }, _) => {
            Request::AddExport {
                name: name.clone(),
                source: absolute(source)?,
                read_only: *read_only,
                format: format.map(|format| imgfmt::Format::from(format).name().to_owned()),
                description: description.clone(),
            }
        }
        (ControlCommand::RemoveExport { name, disconnect }, _) => Request::RemoveExport {
            name: name.clone(),
            on_use: if *disconnect { OnUse::Disconnect } else { OnUse::Refuse },
        },
        (ControlCommand::BitmapAdd { granularity, disabled, .. }, (export, bitmap)) => {
            Request::BitmapAdd {
                export,
                bitmap,
                granularity: granularity.map(ByteSize::bytes),
                initial: if *disabled { InitialState::Disabled } else { InitialState::Enabled },
            }
        }
        (ControlCommand::BitmapRemove { .. }, (export, bitmap)) => {
            Request::BitmapRemove { export, bitmap }
        }
        (ControlCommand::BitmapClear { .. }, (export, bitmap)) => {
            Request::BitmapClear { export, bitmap }
        }
        (ControlCommand::BitmapEnable { .. }, (export, bitmap)) => {
            Request::BitmapEnable { export, bitmap }
        }
        (ControlCommand::BitmapDisable { .. }, (export, bitmap)) => {
            Request::BitmapDisable { export, bitmap }
        }
        (ControlCommand::BitmapMerge { from, .. }, (export, bitmap)) => {
            Request::BitmapMerge { export, bitmap, from: from.clone() }
        }
        (ControlCommand::CheckpointStart { export, bitmap, add_bitmap, view }, _) => {
            Request::CheckpointStart {
                export: export.clone(),
                bitmap: bitmap.clone(),
                if_missing: if *add_bitmap { IfMissing::Add } else { IfMissing::Fail },
                view: view.clone(),
            }
        }
        (ControlCommand::CheckpointEnd { export, outcome }, _) => Request::CheckpointEnd {
            export: export.clone(),
            outcome: match outcome {
                BackupOutcome::Success => Verdict::Success,
                BackupOutcome::Failure => Verdict::Failure,
            },
        },
        (ControlCommand::Shutdown, _) => Request::Shutdown {},
    })
}

impl ControlCommand {
    /// The command with the names of its export and bitmap, if it has both.
    fn clone_names(&self) -> (&Self, (String, String)) {
        let names = match self {
            Self::BitmapAdd { export, bitmap, .. }
            | Self::BitmapRemove { export, bitmap }
            | Self::BitmapClear { export, bitmap }
            | Self::BitmapEnable { export, bitmap }
            | Self::BitmapDisable { export, bitmap }
            | Self::BitmapMerge { export, bitmap, .. } => (export.clone(), bitmap.clone()),
            _ => (String::new(), String::new()),
        };
        (self, names)
    }
}

/// The server may work in another folder.
fn absolute(source: &std::path::Path) -> Result<String, CommandError> {
    let text = source
        .to_str()
        .ok_or_else(|| CommandError::new(format!("'{}' is not valid UTF-8", source.display())))?;
    if text.starts_with("memory:") {
        return Ok(text.to_owned());
    }
    let path = std::path::absolute(source).map_err(|error| {
        CommandError::new(format!("cannot find '{}': {error}", source.display()))
    })?;
    path.to_str()
        .map(ToOwned::to_owned)
        .ok_or_else(|| CommandError::new(format!("'{}' is not valid UTF-8", path.display())))
}

fn print(command: &ControlCommand, result: Value, output: &mut Output) -> Result<(), CommandError> {
    let unclear = |error: serde_json::Error| {
        CommandError::new(format!("the server's reply cannot be understood: {error}"))
    };
    match command {
        ControlCommand::List => {
            print_listing(&serde_json::from_value(result).map_err(unclear)?, output)
        }
        ControlCommand::CheckpointStart { .. } => {
            let begun: Begun = serde_json::from_value(result).map_err(unclear)?;
            begun.uris.iter().try_for_each(|uri| output.line(&printable(uri)))
        }
        ControlCommand::AddExport { .. } => {
            let uris = result.get("uris").and_then(Value::as_array);
            let uris = uris.into_iter().flatten().filter_map(Value::as_str);
            uris.into_iter().try_for_each(|uri| output.line(&printable(uri)))
        }
        _ => Ok(()),
    }
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
            printable(&client.peer)
        ))?;
    }
    Ok(())
}
