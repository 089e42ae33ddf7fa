//! The command line as a whole: which commands there are and what they have in common.

use clap::{ArgAction, Parser, Subcommand};

use crate::commands::{
    backup, bitmap, completions, control, copy, image, info, list_meta, map, qemu_nbd, restore,
    serve,
};

pub use crate::size::ByteSize;
pub use crate::terminal::ColorChoice;

/// What is said below the list of commands.
const AFTER_HELP: &str = "\
Examples:
  nbd-cli serve memory:1G                    a scratch disk at nbd://127.0.0.1:10809/
  nbd-cli serve --read-only disk.img         a disk image, for reading only
  nbd-cli info nbd://127.0.0.1/              what a server offers
  nbd-cli copy nbd://127.0.0.1/ backup.img   a copy that keeps the holes
  nbd-cli image info disk.qcow2              what an image file is

Exit codes:
  0  success; for `info --can`, `--is` and `--has`: yes
  1  an error, wrong usage included: one sentence on standard error says what to do
  2  for `info --can`, `--is` and `--has`: no
  `image check` and `image compare` have codes of their own: see their --help.
  `serve --run` returns the status of the command (128 + N if signal N ended it).
  128 + N if signal N interrupted a command that writes; what it left is said on standard error.
  A second SIGINT or SIGTERM ends a server at once, with 128 + the signal's number.
  A reader that closes its end of the pipe early (`nbd-cli map … | head -1`) is not an error.";

/// Serve, inspect, map and copy disks over the Network Block Device (NBD) protocol.
#[derive(Debug, Parser)]
#[command(name = "nbd-cli", version, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Cli {
    /// Log to standard error; twice for what is negotiated and each request that is served.
    #[arg(short, long, action = ArgAction::Count, global = true)]
    pub verbose: u8,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The sub-commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Export disk images, block devices or memory disks
    Serve(serve::ServeArgs),
    /// Describe a server and its exports
    Info(info::InfoArgs),
    /// List the metadata contexts that a server offers for an export
    ListMeta(list_meta::ListMetaArgs),
    /// Show which parts of an export hold data
    Map(map::MapArgs),
    /// Copy a disk between NBD servers, files and devices
    Copy(copy::CopyArgs),
    /// Back up a served disk, in full or only what has changed
    Backup(backup::BackupArgs),
    /// Restore a backup or any other image to a file, a device or a server
    Restore(restore::RestoreArgs),
    /// Look at a running server and change what it does
    Control(control::ControlArgs),
    /// Make, inspect, convert and change disk images
    Image(image::ImageArgs),
    /// List, add, merge and change the dirty bitmaps of an image
    Bitmap(bitmap::BitmapArgs),
    /// Serve as qemu-nbd does, with its options; also under that name
    QemuNbd(qemu_nbd::QemuNbdArgs),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
}

impl Command {
    /// Whether it makes or changes a disk, so that it may not simply be killed by a signal.
    /// `backup` looks after signals itself, because of its checkpoint.
    pub(crate) fn writes(&self) -> bool {
        match self {
            Self::Copy(_) | Self::Restore(_) => true,
            Self::Image(args) => args.command.writes(),
            Self::Bitmap(args) => args.command.writes(),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
