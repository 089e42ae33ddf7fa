//! The command line: the commands and their common options.

use clap::{ArgAction, Parser, Subcommand};

#[cfg(feature = "mount")]
use crate::commands::mount;
#[cfg(feature = "object-storage")]
use crate::commands::repo;
use crate::commands::{
    attach, backup, bench, bitmap, checksum, completions, control, copy, detach, devices, image,
    info, list_meta, map, qemu_img, qemu_nbd, restore, serve, tls, top,
};
use crate::logging::DISPLAY_ORDER;

pub use crate::logging::{LogArgs, LogFormat};
pub use crate::terminal::ColorChoice;
pub use nbd_jobs::size::ByteSize;

/// The text after the list of commands.
const AFTER_HELP: &str = "\
Examples:
  nbd-cli serve memory:1G                    a scratch disk at nbd://127.0.0.1:10809/
  nbd-cli serve --read-only disk.img         a disk image, read-only
  nbd-cli info nbd://127.0.0.1/              the exports of a server
  nbd-cli copy nbd://127.0.0.1/ backup.img   a copy that keeps the holes
  nbd-cli image info disk.qcow2              a description of an image file

Exit codes:
  0  success; for `info --can`, `--is` and `--has`: yes
  1  an error, including wrong usage: one sentence on standard error names the remedy
  2  for `info --can`, `--is` and `--has`: no
  `image check` and `image compare` have codes of their own: see their --help.
  `serve --run` returns the status of the command (128 + N if signal N ended it).
  128 + N if signal N interrupted a command that writes; standard error reports what it left.
  A second SIGINT or SIGTERM ends a server at once, with 128 + the signal's number.
  A reader that closes its end of the pipe early (`nbd-cli map … | head -1`) is not an error;
  `copy FILE - | head` is silent too and returns 141, as `cat` does.";

/// Serve, inspect, map and copy disks over the Network Block Device (NBD) protocol.
#[derive(Debug, Parser)]
#[command(name = "nbd-cli", version, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Cli {
    /// Log to standard error; twice for negotiation details and every request served. Without it,
    /// the environment variable NBD_LOG sets the level, or levels of parts (info,nbd_server=debug).
    #[arg(short, long, action = ArgAction::Count, global = true, display_order = DISPLAY_ORDER)]
    pub verbose: u8,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub log: LogArgs,

    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Export disk images, block devices or memory disks
    Serve(Box<serve::ServeArgs>),
    /// Describe a server and its exports
    Info(info::InfoArgs),
    /// List the metadata contexts that a server offers for an export
    ListMeta(list_meta::ListMetaArgs),
    /// Show which parts of an export hold data
    Map(map::MapArgs),
    /// Copy a disk between NBD servers, files and devices
    Copy(Box<copy::CopyArgs>),
    /// Compute the digest of a disk
    Checksum(checksum::ChecksumArgs),
    /// Show disks and their partitions as files, and the files in them
    #[cfg(feature = "mount")]
    Mount(mount::MountArgs),
    /// Measure a server under load, and verify its data
    Bench(bench::BenchArgs),
    /// Back up a served disk, in full or only its changes
    Backup(backup::BackupArgs),
    /// Make, list, check and clean repositories of backups
    #[cfg(feature = "object-storage")]
    Repo(repo::RepoArgs),
    /// Restore a backup or any other image to a file, a device or a server
    Restore(restore::RestoreArgs),
    /// Give a disk a kernel device (/dev/nbdX)
    Attach(Box<attach::AttachArgs>),
    /// Disconnect a kernel device
    Detach(detach::DetachArgs),
    /// List the attached kernel devices
    Devices(devices::DevicesArgs),
    /// Inspect and control a running server
    Control(control::ControlArgs),
    /// Show the activity of a running server, live
    Top(top::TopArgs),
    /// Create, inspect, convert and change disk images
    Image(image::ImageArgs),
    /// List, add, merge and change the dirty bitmaps of an image
    Bitmap(bitmap::BitmapArgs),
    /// Serve with the command line of qemu-nbd; also under that name
    QemuNbd(qemu_nbd::QemuNbdArgs),
    /// Work on images with the command line of qemu-img; also under that name
    QemuImg(qemu_img::QemuImgArgs),
    /// Create and renew certificates and pre-shared keys
    Tls(tls::TlsArgs),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
}

impl Command {
    /// Returns whether the command creates or changes a disk, so that a signal must not kill it.
    /// `backup` handles signals itself, because of its checkpoint.
    pub(crate) fn writes(&self) -> bool {
        match self {
            // An interrupted load still has a report.
            Self::Copy(_) | Self::Restore(_) | Self::Bench(_) => true,
            Self::Image(args) => args.command.writes(),
            Self::Bitmap(args) => args.command.writes(),
            #[cfg(feature = "object-storage")]
            Self::Repo(args) => args.command.writes(),
            _ => false,
        }
    }

    /// Returns whether the command reads each part of an image once.
    pub(crate) fn reads_once(&self) -> bool {
        match self {
            Self::Copy(_) | Self::Checksum(_) | Self::QemuImg(_) => true,
            Self::Backup(args) => args.verify.is_none(),
            Self::Image(args) => {
                matches!(
                    args.command,
                    image::ImageCommand::Convert(_) | image::ImageCommand::Compare(_)
                )
            }
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
