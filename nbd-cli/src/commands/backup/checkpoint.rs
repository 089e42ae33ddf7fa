//! Backups of a disk in use: a checkpoint is begun, copied and ended through the control socket.

use std::path::Path;

use nbd_proto::NbdUri;

use super::{BackupArgs, Report};
use crate::control::{Begun, Conversation, IfMissing, IfUnusable, Lifetime, Request, Verdict};
use crate::error::CommandError;
use crate::output::{printable, warn};

/// Begins a checkpoint, has `backup` copy it, and ends it with what came of that.
pub(super) fn checkpointed(
    args: &BackupArgs,
    socket: &Path,
    backup: impl FnOnce(&NbdUri) -> Result<Report, CommandError>,
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
        // If this process is killed nobody else ends it.
        lifetime: Lifetime::Connection,
    };
    let mut conversation = Conversation::begin(socket)?;
    let begun = conversation.call(&begin)?;
    let mut end =
        |outcome| conversation.call(&Request::CheckpointEnd { export: export.clone(), outcome });
    let result = uri_of_view(args, begun).and_then(|uri| backup(&uri));
    match result {
        Ok(report) => {
            end(Verdict::Success).map_err(|error| {
                CommandError::new(format!(
                    "'{}' may not be used: {error}; remove it",
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
fn uri_of_view(args: &BackupArgs, begun: serde_json::Value) -> Result<NbdUri, CommandError> {
    let begun: Begun = serde_json::from_value(begun).map_err(|error| {
        CommandError::new(format!("the server's reply cannot be understood: {error}"))
    })?;
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
        return Ok(uri);
    }
    let uri = begun.uris.first().ok_or_else(|| {
        CommandError::new("the server does not say where it listens; give the disk's URI as well")
    })?;
    let uri = uri.parse().map_err(|error| {
        CommandError::new(format!("the server says that it listens on '{uri}': {error}"))
    })?;
    args.tls.check([&uri])?;
    Ok(uri)
}
