//! Backups of a disk in use: a checkpoint is begun, copied and ended through the control socket.

use std::path::Path;

use imgfmt::Uuid;
use nbd_proto::NbdUri;

use super::chain::Base;
use super::{BackupArgs, Issued, Report};
use nbd_jobs::control::{
    Begun, Conversation, IfMissing, IfUnusable, Lifetime, Listing, Request, Verdict,
};
use crate::error::CommandError;
use crate::output::{printable, warn};

/// Begins a checkpoint, has `backup` copy it, and ends it with what came of that.
pub(super) fn checkpointed(
    args: &BackupArgs,
    socket: &Path,
    base: Option<&Base>,
    backup: impl FnOnce(&NbdUri, Issued) -> Result<Report, CommandError>,
) -> Result<Report, CommandError> {
    let export = args.export.clone().unwrap_or_default();
    let begin = Request::CheckpointStart {
        export: export.clone(),
        bitmap: args.bitmap.clone(),
        if_missing: if args.base.is_none() { IfMissing::Add } else { IfMissing::Fail },
        // A full backup does not need what the bitmap has noted.
        if_unusable: match args.base {
            None => IfUnusable::BeginAnew,
            Some(_) => IfUnusable::Fail,
        },
        view: None,
        base: base.and_then(Base::id).map(|id| id.to_string()),
        trust_base: args.trust_base && base.and_then(Base::id).is_some(),
        // If this process is killed nobody else ends it.
        lifetime: Lifetime::Connection,
    };
    let mut conversation = Conversation::begin(socket)?;
    // Before the bitmap begins anew.
    if let Some(base) = base {
        refuse_wrong(args, base, &export, &mut conversation)?;
    }
    let begun = conversation.call(&begin)?;
    let mut end =
        |outcome| conversation.call(&Request::CheckpointEnd { export: export.clone(), outcome });
    let result = uri_of_view(args, begun).and_then(|(uri, issued)| backup(&uri, issued));
    match result {
        Ok(report) => {
            end(Verdict::Success).map_err(|error| {
                CommandError::new(format!(
                    "'{}' may not be used: {error}; make another backup",
                    args.target.display()
                ))
            })?;
            Ok(report)
        }
        Err(error) => {
            if let Err(second) = end(Verdict::Failure) {
                warn(&format!(
                    "the checkpoint could not be ended: {second}; end it with `nbd-cli control`"
                ));
            }
            Err(error)
        }
    }
}

/// Where the view is: at the server that was named, or as the server itself says.
fn uri_of_view(
    args: &BackupArgs,
    begun: serde_json::Value,
) -> Result<(NbdUri, Issued), CommandError> {
    let begun: Begun = serde_json::from_value(begun).map_err(|error| not_understood(&error))?;
    let uuid = |text: &Option<String>| text.as_deref().and_then(|text| text.parse().ok());
    let mut issued = Issued::ours()?;
    issued.backup = uuid(&begun.backup).unwrap_or(issued.backup);
    issued.disk = uuid(&begun.disk);
    if let Some(reason) = &begun.begun_anew {
        let bitmap = printable(args.bitmap.as_deref().unwrap_or_default());
        warn(&format!(
            "the bitmap '{bitmap}' could not be relied on ({}); it begins anew with this backup",
            printable(reason)
        ));
    }
    if let Some(uri) = &args.source {
        let mut uri = uri.clone();
        uri.export_name = begun.view;
        return Ok((uri, issued));
    }
    let uri = begun.uris.first().ok_or_else(|| {
        CommandError::new("the server does not say where it listens; give the disk's URI as well")
    })?;
    let uri = uri.parse().map_err(|error| {
        CommandError::new(format!("the server says that it listens on '{uri}': {error}"))
    })?;
    args.tls.check([&uri])?;
    Ok((uri, issued))
}

/// Refuses a base that may be the wrong one, and one after which the bitmap did not begin: it says after
/// which one it did. The server refuses it too, but does not know the files.
fn refuse_wrong(
    args: &BackupArgs,
    base: &Base,
    export: &str,
    conversation: &mut Conversation,
) -> Result<(), CommandError> {
    let listing: Listing = serde_json::from_value(conversation.call(&Request::List {})?)
        .map_err(|error| not_understood(&error))?;
    let bitmap = args.bitmap.as_deref().unwrap_or_default();
    let export = listing.exports.iter().find(|found| found.name == export);
    if let Some(export) = export {
        base.check(export.size, args)?;
    }
    let disk = export.and_then(|it| it.disk.as_deref()?.parse::<Uuid>().ok());
    if let (Some(disk), Some(own)) = (disk, base.disk())
        && disk != own
    {
        return Err(base.of_another_disk());
    }
    let found = export.and_then(|it| it.bitmaps.iter().find(|found| found["name"] == bitmap));
    let Some(found) = found else { return Ok(()) };
    let began_after = ["began-after", "perhaps-began-after"]
        .iter()
        .find_map(|field| found[field].as_str()?.parse::<Uuid>().ok());
    match (began_after, base.id()) {
        (Some(right), Some(id)) if right != id => Err(base.wrong(bitmap, right, &args.target)),
        _ => Ok(()),
    }
}

fn not_understood(error: &serde_json::Error) -> CommandError {
    CommandError::new(format!("the server's reply cannot be understood: {error}"))
}
