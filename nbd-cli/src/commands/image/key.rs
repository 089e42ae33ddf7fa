//! `nbd-cli image key`: the passphrases of encrypted images.

use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser as _};
use clap::{ArgGroup, Args, Subcommand};
use imgfmt::{Encryption, Image, KeyChange, KeysChanged, LuksSlot, OpenOptions};
use nbd_jobs::image_report::LuksSlotReport;

use super::open::explained;
use crate::error::{CommandError, Outcome};
use crate::file_path::FilePathParser;
use crate::image_format::ImageFormat;
use crate::key_file::{KeyArgs, KeyFile};
use crate::locking::{LockArgs, ShareArgs};
use crate::new_key::IterTimeArgs;
use crate::output::{Output, ReportFormat};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image key list disk.luks
  nbd-cli image key add --key-file disk.key --new-key-file - disk.luks
  nbd-cli image key change --key-file old.key --new-key-file new.key disk.qcow2
  nbd-cli image key remove --key-file disk.key --old-key-file lost.key disk.luks
  nbd-cli image key remove --key-file disk.key --slot 3 disk.luks

For LUKS volumes of version 1 and qcow2 images with LUKS, which must not be in use. The keys of LUKS
volumes of version 2 are changed with cryptsetup.

A new passphrase is on stable storage and was read back before an old one is overwritten. A slot is
removed only if --key-file has a passphrase that stays. If a command is interrupted, no passphrase
that stays is lost; see 'image key list', and run it again. The key of the disk itself stays the same:
a person who has it can still decrypt the disk. 'image convert --encrypt' makes an image with another
key.";

/// Arguments of `nbd-cli image key`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct KeyCommandArgs {
    /// The subcommand.
    #[command(subcommand)]
    pub command: KeyCommand,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// List the key slots; no passphrase is needed
    List(ListArgs),
    /// Add a passphrase
    Add(AddArgs),
    /// Remove a passphrase, or a key slot
    Remove(RemoveArgs),
    /// Replace a passphrase by another one
    Change(ChangeArgs),
}

/// The image.
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// The image.
    #[arg(value_parser = FilePathParser)]
    pub path: PathBuf,

    /// Format of the image; detected unless given.
    #[arg(short, long)]
    pub format: Option<ImageFormat>,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub locks: LockArgs,
}

/// A new passphrase.
#[derive(Debug, Args)]
pub struct NewArgs {
    /// A file with the new passphrase, all bytes of it. '-' asks for it twice, or reads standard
    /// input if that is not a terminal; /dev/fd/N reads a descriptor.
    #[arg(long, value_name = "FILE", value_parser = OsStringValueParser::new().map(KeyFile::new))]
    pub new_key_file: KeyFile,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub iter_time: IterTimeArgs,
}

/// Arguments of `nbd-cli image key list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub image: ImageArgs,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub share: ShareArgs,
}

/// Arguments of `nbd-cli image key add`.
#[derive(Debug, Args)]
pub struct AddArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub image: ImageArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub keys: KeyArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub new: NewArgs,

    /// The key slot, from 0 to 7; the first that is not in use unless given.
    #[arg(long, value_name = "NUMBER")]
    pub slot: Option<u32>,
}

/// Arguments of `nbd-cli image key remove`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("which").required(true).args(["old_key_file", "slot"])))]
pub struct RemoveArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub image: ImageArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub keys: KeyArgs,

    /// A file with the passphrase to remove, from every key slot that it opens. '-' asks for it.
    #[arg(long, value_name = "FILE", value_parser = OsStringValueParser::new().map(KeyFile::new))]
    pub old_key_file: Option<KeyFile>,

    /// The key slot to remove, from 0 to 7.
    #[arg(long, value_name = "NUMBER")]
    pub slot: Option<u32>,
}

/// Arguments of `nbd-cli image key change`.
#[derive(Debug, Args)]
pub struct ChangeArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub image: ImageArgs,

    /// A file with the present passphrase, all bytes of it. '-' asks for it, or reads standard
    /// input if that is not a terminal; /dev/fd/N reads a descriptor.
    #[arg(long, value_name = "FILE", value_parser = OsStringValueParser::new().map(KeyFile::new))]
    pub key_file: KeyFile,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub new: NewArgs,
}

impl ImageArgs {
    fn options(&self) -> OpenOptions {
        let options = self.locks.options();
        match self.format {
            Some(format) => options.format(format.into()),
            None => options,
        }
    }

    fn change(&self, keys: &KeyArgs, change: &KeyChange) -> Result<Outcome, CommandError> {
        let changed = Image::change_keys(&self.path, &keys.apply(self.options()), change);
        say(&changed.map_err(explained)?)
    }
}

pub(crate) fn run(args: &KeyCommandArgs) -> Result<Outcome, CommandError> {
    match &args.command {
        KeyCommand::List(args) => list(args),
        KeyCommand::Add(args) => {
            let key = args.new.iter_time.key(&args.new.new_key_file)?;
            args.image.change(&args.keys, &KeyChange::Add { key, slot: args.slot })
        }
        KeyCommand::Remove(args) => {
            let change = match (&args.old_key_file, args.slot) {
                (Some(file), None) => KeyChange::Remove(file.passphrase()),
                (None, Some(slot)) => KeyChange::RemoveSlot(slot),
                // The parser refuses both; a slot is never guessed.
                _ => return Err(CommandError::new("give either --old-key-file or --slot")),
            };
            args.image.change(&args.keys, &change)
        }
        KeyCommand::Change(args) => {
            let old = args.key_file.passphrase();
            let key = args.new.iter_time.key(&args.new.new_key_file)?;
            args.image.change(&KeyArgs::default(), &KeyChange::Replace { old, key })
        }
    }
}

fn say(changed: &KeysChanged) -> Result<Outcome, CommandError> {
    let mut output = Output::new();
    if let Some(number) = changed.added {
        output.line(&format!("added: key slot {number}"))?;
    }
    for number in &changed.removed {
        output.line(&format!("removed: key slot {number}"))?;
    }
    output.finish()?;
    Ok(Outcome::Success)
}

fn list(args: &ListArgs) -> Result<Outcome, CommandError> {
    let options = args.share.apply(args.image.options());
    let info = Image::inspect_file(&args.image.path, &options).map_err(explained)?;
    let slots = slots(info.encryption).map_err(|why| {
        CommandError::new(format!("cannot list the keys of '{}': {why}", args.image.path.display()))
    })?;
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json => {
            let slots: Vec<_> = slots.iter().map(LuksSlotReport::from).collect();
            output.json(&slots)?;
        }
        ReportFormat::Text => {
            for (number, slot) in slots.iter().enumerate() {
                let state = match slot.is_active {
                    true if slot.is_being_removed => {
                        "its removal was interrupted: remove it again".to_owned()
                    }
                    true => format!("in use, {} iterations", slot.iterations),
                    false => "free".to_owned(),
                };
                output.line(&format!("key slot {number}: {state}"))?;
            }
        }
    }
    output.finish()?;
    Ok(Outcome::Success)
}

/// The key slots of a header of version 1, or why there are none.
fn slots(encryption: Option<Encryption>) -> Result<Vec<LuksSlot>, &'static str> {
    match encryption {
        Some(Encryption::Luks(Some(luks))) => luks
            .details
            .map(|details| details.slots)
            .ok_or("it has a LUKS header of version 2, whose keys 'cryptsetup luksDump' lists"),
        Some(Encryption::Luks(None)) => Err("its LUKS header cannot be read"),
        _ => Err("it is not encrypted with LUKS, so it has no key slots"),
    }
}
