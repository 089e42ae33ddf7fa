//! `nbd-cli image`: create, inspect, convert and change disk images, without a server.

mod amend;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod format_options;
pub(super) mod info;
mod key;
pub(super) mod location;
mod map;
mod measure;
pub(super) mod open;
#[cfg(feature = "object-storage")]
mod push;
pub(super) mod read;
mod rebase;
mod resize;
mod snapshot;
mod stream;

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue};
use clap::{Args, Subcommand};

use crate::error::{CommandError, Outcome};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image create --format qcow2 disk.qcow2 20G
  nbd-cli image info disk.qcow2
  nbd-cli image convert --output-format qcow2 --compress disk.img disk.qcow2
  nbd-cli image check --repair leaks disk.qcow2

Each command has examples and exit codes of its own: nbd-cli image create --help";

/// Arguments of `nbd-cli image`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct ImageArgs {
    /// The subcommand.
    #[command(subcommand)]
    pub command: ImageCommand,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Create an image
    Create(create::CreateArgs),
    /// Describe an image
    Info(info::InfoArgs),
    /// Check for leaks and damage, and repair them on request
    Check(check::CheckArgs),
    /// Show where the parts of the disk are stored
    Map(map::MapArgs),
    /// Copy an image into a new one, optionally of another format
    Convert(convert::ConvertArgs),
    /// Change the size of the disk
    Resize(resize::ResizeArgs),
    /// Change the version or a feature of a qcow2 image in place
    Amend(amend::AmendArgs),
    /// List, add, remove and change the passphrases of an encrypted image
    Key(key::KeyCommandArgs),
    /// Change the backing file of an overlay
    Rebase(rebase::RebaseArgs),
    /// Write the contents of an overlay into its backing file
    Commit(commit::CommitArgs),
    /// Copy into an overlay what its backing files provide
    Stream(stream::StreamArgs),
    /// List, create, apply and delete internal snapshots
    Snapshot(snapshot::SnapshotArgs),
    /// Put an image on an object store
    #[cfg(feature = "object-storage")]
    Push(push::PushArgs),
    /// Report the space that an image would need
    Measure(measure::MeasureArgs),
    /// Check whether two images hold the same disk
    Compare(compare::CompareArgs),
}

/// What to say if a command for images was given without `image`.
pub(crate) fn meant_by(error: &clap::Error) -> Option<CommandError> {
    let Some(ContextValue::String(name)) = error.get(ContextKind::InvalidSubcommand) else {
        return None;
    };
    ImageCommand::has_subcommand(name).then(|| {
        CommandError::new(format!("'{name}' is a command for images; write 'nbd-cli image {name}'"))
    })
}

impl ImageCommand {
    /// Returns whether the command creates or changes an image in steps. An interrupted repair is
    /// simply repeated.
    pub(crate) fn writes(&self) -> bool {
        match self {
            Self::Create(_)
            | Self::Convert(_)
            | Self::Resize(_)
            | Self::Rebase(_)
            | Self::Commit(_)
            | Self::Stream(_) => true,
            #[cfg(feature = "object-storage")]
            Self::Push(_) => true,
            Self::Snapshot(args) => args.command.writes(),
            _ => false,
        }
    }
}

pub(crate) fn run(args: ImageArgs) -> Result<Outcome, CommandError> {
    match args.command {
        ImageCommand::Create(args) => create::run(&args),
        ImageCommand::Info(args) => info::run(&args),
        ImageCommand::Check(args) => check::run(&args),
        ImageCommand::Map(args) => map::run(&args),
        ImageCommand::Convert(args) => convert::run(&args),
        ImageCommand::Resize(args) => resize::run(&args),
        ImageCommand::Amend(args) => amend::run(&args),
        ImageCommand::Key(args) => key::run(&args),
        ImageCommand::Rebase(args) => rebase::run(&args),
        ImageCommand::Commit(args) => commit::run(&args),
        ImageCommand::Stream(args) => stream::run(&args),
        ImageCommand::Snapshot(args) => snapshot::run(&args),
        #[cfg(feature = "object-storage")]
        ImageCommand::Push(args) => push::run(&args),
        ImageCommand::Measure(args) => measure::run(&args),
        ImageCommand::Compare(args) => compare::run(&args),
    }
}

/// Returns the exit code of wrong usage: 1, but 2 for `image compare`, where 1 means that the
/// images differ.
pub(crate) fn usage_code(arguments: &[OsString]) -> u8 {
    let mut words =
        arguments.iter().skip(1).filter(|word| !word.to_string_lossy().starts_with('-'));
    let is_compare = words.next().is_some_and(|word| word == "image")
        && words.next().is_some_and(|word| word == "compare");
    if is_compare { 2 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_usage_of_compare_does_not_look_like_a_difference() {
        let code =
            |words: &[&str]| usage_code(&words.iter().map(OsString::from).collect::<Vec<_>>());
        assert_eq!(code(&["nbd-cli", "-v", "image", "compare", "a"]), 2);
        assert_eq!(code(&["nbd-cli", "image", "check"]), 1);
        assert_eq!(code(&["nbd-cli", "copy", "image", "compare"]), 1);
    }
}
