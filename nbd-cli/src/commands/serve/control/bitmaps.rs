//! Requests about bitmaps.

use imgfmt::{BITMAP_GRANULARITY_DEFAULT, BitmapChange, BitmapInfo, BitmapState, Recording};
use serde_json::{Value, json};

use super::{Disk, Disks, blocking};
use crate::control::{ErrorKind, Failure, InitialState, Request};

/// The bitmaps of a disk.
pub(super) async fn list(disk: &Disk) -> Result<Vec<Value>, Failure> {
    let Some(image) = disk.image.clone() else { return Ok(Vec::new()) };
    let found = blocking(move || image.image().bitmaps()).await?;
    Ok(found.iter().map(describe).collect())
}

fn describe(bitmap: &BitmapInfo) -> Value {
    let mut described = json!({
        "name": bitmap.name,
        "granularity": bitmap.granularity,
        "enabled": bitmap.recording == Recording::Enabled,
    });
    match &bitmap.state {
        BitmapState::Consistent { dirty_bytes } => described["dirty-bytes"] = json!(dirty_bytes),
        BitmapState::Inconsistent { reason } | BitmapState::Damaged { reason } => {
            described["problem"] = json!(reason);
        }
        _ => described["problem"] = json!("its bits cannot be relied on"),
    }
    described
}

/// Carries out a request that changes bitmaps.
pub(super) async fn change(disks: &Disks, request: Request) -> Result<Value, Failure> {
    let (export, change) = match request {
        Request::BitmapAdd { export, bitmap: name, granularity, initial } => {
            let granularity = granularity.unwrap_or(BITMAP_GRANULARITY_DEFAULT);
            let recording = match initial {
                InitialState::Enabled => Recording::Enabled,
                InitialState::Disabled => Recording::Disabled,
            };
            (export, BitmapChange::Add { name, granularity, recording })
        }
        Request::BitmapRemove { export, bitmap: name } => (export, BitmapChange::Remove { name }),
        Request::BitmapClear { export, bitmap: name } => (export, BitmapChange::Clear { name }),
        Request::BitmapEnable { export, bitmap: name } => (export, BitmapChange::Enable { name }),
        Request::BitmapDisable { export, bitmap: name } => (export, BitmapChange::Disable { name }),
        Request::BitmapMerge { export, bitmap: into, from } => {
            (export, BitmapChange::Merge { into, from })
        }
        _ => return Err(Failure::new(ErrorKind::InvalidRequest, "no request about a bitmap")),
    };
    let disk = disks.get(&export)?;
    refuse_if_frozen(disk, &change)?;
    let image = disk.image()?;
    blocking(move || image.image().bitmap_transaction(&[change])).await??;
    Ok(json!({}))
}

/// While a checkpoint is in progress its bitmaps are not changed by others.
fn refuse_if_frozen(disk: &Disk, change: &BitmapChange) -> Result<(), Failure> {
    let (BitmapChange::Merge { into: changed, .. }
    | BitmapChange::Remove { name: changed }
    | BitmapChange::Clear { name: changed }
    | BitmapChange::Enable { name: changed }
    | BitmapChange::Disable { name: changed }) = change
    else {
        return Ok(());
    };
    let bitmap = disk.checkpoint.as_ref().and_then(|checkpoint| checkpoint.bitmap.as_ref());
    let Some(bitmap) = bitmap else { return Ok(()) };
    if bitmap.name == *changed || bitmap.frozen.as_ref() == Some(changed) {
        let message = format!("the bitmap '{changed}' belongs to a checkpoint; end it first");
        return Err(Failure::new(ErrorKind::InUse, message));
    }
    Ok(())
}
