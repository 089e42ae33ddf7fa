//! The requests of the control socket as subcommands.

use clap::builder::{BoolishValueParser, PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Args, Subcommand};
use nbd_jobs::control::{
    IfMissing, IfUnusable, InitialState, Lifetime, OnUse, Outcome, Request, StreamAction,
};
use nbd_jobs::size::ByteSize;

/// A request as a command line. Names are those of exports and of bitmaps in their images.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub(crate) enum ControlCommand {
    /// List exports with their bitmaps, and clients
    List {},
    /// Export a file, a device or memory:SIZE
    AddExport {
        /// Name of the new export.
        name: String,
        /// The source of the export.
        source: String,
        /// Refuse all writes.
        #[arg(short, long)]
        read_only: bool,
        /// Format of the image; detected unless given.
        #[arg(short, long, value_parser = ["raw", "qcow2"])]
        format: Option<String>,
        /// Description shown to clients.
        #[arg(short = 'D', long, value_name = "TEXT")]
        description: Option<String>,
    },
    /// Remove an export and close its image
    RemoveExport {
        /// Name of the export.
        name: String,
        /// Disconnect the clients that use it; without this, an export in use is kept.
        #[arg(long = "disconnect", action = ArgAction::SetTrue,
              value_parser = flag(OnUse::Refuse, OnUse::Disconnect))]
        on_use: OnUse,
    },
    /// Add an empty bitmap
    BitmapAdd {
        /// Name of the export.
        export: String,
        /// Name of the new bitmap.
        bitmap: String,
        /// Bytes of the disk per bit: a power of two from 512 to 2G.
        #[arg(short, long, value_name = "SIZE", value_parser = parse_bytes)]
        granularity: Option<u64>,
        /// Do not record changes yet.
        #[arg(long = "disabled", action = ArgAction::SetTrue,
              value_parser = flag(InitialState::Enabled, InitialState::Disabled))]
        initial: InitialState,
    },
    /// Remove a bitmap
    BitmapRemove(BitmapName),
    /// Clear a bitmap
    BitmapClear(BitmapName),
    /// Start recording changes
    BitmapEnable(BitmapName),
    /// Stop recording changes
    BitmapDisable(BitmapName),
    /// Add the dirty ranges of one bitmap to another
    BitmapMerge {
        /// Name of the export.
        export: String,
        /// Name of the bitmap that is changed.
        bitmap: String,
        /// Name of the bitmap that is read.
        from: String,
    },
    /// Freeze a bitmap, restart it empty, and export the disk as of that moment
    // The view is read-only and has the frozen bits as the bitmap's. The moment is between two
    // writes.
    CheckpointStart {
        /// Name of the export.
        export: String,
        /// The bitmap; without one, only the view is created.
        #[arg(short = 'B', long, value_name = "NAME")]
        bitmap: Option<String>,
        /// Add the bitmap if it does not exist.
        #[arg(long = "add-bitmap", action = ArgAction::SetTrue, requires = "bitmap",
              value_parser = flag(IfMissing::Fail, IfMissing::Add))]
        if_missing: IfMissing,
        /// Name of the view's export [default: the export's name followed by .checkpoint].
        #[arg(long, value_name = "NAME")]
        view: Option<String>,
        /// Restart an unreliable bitmap: for a full backup, which does not need the recorded
        /// changes.
        #[arg(long = "restart-bitmap", alias = "begin-anew", action = ArgAction::SetTrue,
              requires = "bitmap", value_parser = flag(IfUnusable::Fail, IfUnusable::Restart))]
        if_unusable: IfUnusable,
        /// UUID of the backup on which the new one builds: refused unless the bitmap started after
        /// it.
        #[arg(long, value_name = "UUID", requires = "bitmap")]
        base: Option<String>,
        /// Continue if it is unknown after which backup the bitmap started.
        #[arg(long, requires = "base")]
        trust_base: bool,
    },
    /// End a checkpoint: drop the frozen bits after a success, merge them back after a failure
    CheckpointEnd {
        /// Name of the export.
        export: String,
        /// Whether the backup succeeded.
        #[arg(value_parser = outcome())]
        outcome: Outcome,
    },
    /// Copy into an image what the layers below it provide, and then drop these
    // While it is used. `list` shows the progress.
    Stream {
        /// Name of the export.
        export: String,
        /// Keep this layer and those below it: a name that begins at the directory of the image.
        #[arg(long, value_name = "FILE")]
        base: Option<String>,
        /// Read at most this much per second, such as 50M.
        #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
        rate: Option<u64>,
        /// End the stream. The next one goes on where it was.
        #[arg(long = "cancel", action = ArgAction::SetTrue, conflicts_with_all = ["base", "rate"],
              value_parser = flag(StreamAction::Start, StreamAction::Cancel))]
        action: StreamAction,
    },
    /// Read the file of `serve --config` again, as SIGHUP does
    Reload {},
    /// Stop the server as SIGTERM does
    Shutdown {},
}

// A bitmap of an export. A doc comment would replace the text of the request in its help.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub(crate) struct BitmapName {
    /// Name of the export.
    export: String,
    /// Name of the bitmap.
    bitmap: String,
}

/// The meaning of an option without a value: the first variant if it is absent, the second if it is
/// given.
fn flag<T: Copy + Send + Sync + 'static>(off: T, on: T) -> impl TypedValueParser<Value = T> {
    BoolishValueParser::new().map(move |is_given| if is_given { on } else { off })
}

/// A size in bytes with the suffixes of the command line.
fn parse_bytes(text: &str) -> Result<u64, String> {
    text.parse().map(ByteSize::bytes)
}

/// The outcome of the backup.
fn outcome() -> impl TypedValueParser<Value = Outcome> {
    let values = [
        PossibleValue::new("success").help("The backup is complete"),
        PossibleValue::new("failure").help("The backup failed"),
    ];
    PossibleValuesParser::new(values).map(|word| match word.as_str() {
        "success" => Outcome::Success,
        _ => Outcome::Failure,
    })
}

impl From<ControlCommand> for Request {
    fn from(command: ControlCommand) -> Self {
        match command {
            ControlCommand::List {} => Self::List {},
            ControlCommand::AddExport { name, source, read_only, format, description } => {
                Self::AddExport { name, source, read_only, format, description }
            }
            ControlCommand::RemoveExport { name, on_use } => Self::RemoveExport { name, on_use },
            ControlCommand::BitmapAdd { export, bitmap, granularity, initial } => {
                Self::BitmapAdd { export, bitmap, granularity, initial }
            }
            ControlCommand::BitmapRemove(BitmapName { export, bitmap }) => {
                Self::BitmapRemove { export, bitmap }
            }
            ControlCommand::BitmapClear(BitmapName { export, bitmap }) => {
                Self::BitmapClear { export, bitmap }
            }
            ControlCommand::BitmapEnable(BitmapName { export, bitmap }) => {
                Self::BitmapEnable { export, bitmap }
            }
            ControlCommand::BitmapDisable(BitmapName { export, bitmap }) => {
                Self::BitmapDisable { export, bitmap }
            }
            ControlCommand::BitmapMerge { export, bitmap, from } => {
                Self::BitmapMerge { export, bitmap, from }
            }
            ControlCommand::CheckpointStart {
                export,
                bitmap,
                if_missing,
                view,
                if_unusable,
                base,
                trust_base,
            } => Self::CheckpointStart {
                export,
                bitmap,
                if_missing,
                view,
                if_unusable,
                base,
                trust_base,
                lifetime: Lifetime::Server,
            },
            ControlCommand::CheckpointEnd { export, outcome } => {
                Self::CheckpointEnd { export, outcome }
            }
            ControlCommand::Stream { export, base, rate, action } => {
                Self::Stream { export, base, rate, action }
            }
            ControlCommand::Reload {} => Self::Reload {},
            ControlCommand::Shutdown {} => Self::Shutdown {},
        }
    }
}
