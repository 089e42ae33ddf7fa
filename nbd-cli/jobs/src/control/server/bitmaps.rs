//! Requests about bitmaps.

use imgfmt::{
    BITMAP_GRANULARITY_DEFAULT, BeganAfter, BitmapChange, BitmapInfo, BitmapState, Recording,
};
use nbd_proto::wire::MetaContextName;
use nbd_server::export::ImageExport;
use serde_json::{Value, json};

use super::controller::{Controller, blocking};
use super::disks::ServedDisk;
use crate::control::{ErrorKind, Failure, InitialState, Request};
use crate::frozen_bits;

/// The bitmaps of an image. May block.
pub(super) fn list(image: &ImageExport) -> Vec<Value> {
    image.image().bitmaps().iter().map(describe).collect()
}

fn describe(bitmap: &BitmapInfo) -> Value {
    let mut described = json!({
        "name": bitmap.name,
        "granularity": bitmap.granularity,
        "enabled": bitmap.recording == Recording::Enabled,
    });
    match bitmap.began_after {
        BeganAfter::Backup(id) => described["began-after"] = json!(id.to_string()),
        BeganAfter::PerhapsBackup(id) => described["perhaps-began-after"] = json!(id.to_string()),
        _ => {}
    }
    match &bitmap.state {
        BitmapState::Consistent { dirty_bytes } => described["dirty-bytes"] = json!(dirty_bytes),
        state => described["problem"] = json!(state.problem()),
    }
    described
}

/// Executes a request that changes bitmaps.
pub(super) async fn change(controller: &Controller, request: Request) -> Result<Value, Failure> {
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
    let (turn, disks) = controller.turn(&export, controller.patience).await?;
    let disk = disks.get(&export)?;
    refuse_if_frozen(disk, &change)?;
    let image = disk.image()?;
    drop(disks);
    blocking(move || -> Result<Value, Failure> {
        let _turn = turn;
        let changes = [change.clone()];
        carry_out(&image, change).map_err(|error| {
            let kind = Failure::from(&error).kind;
            Failure::new(
                kind,
                frozen_bits::explain_change(image.image(), &changes, error).to_string(),
            )
        })
    })
    .await?
}

/// Makes the change, and updates the bitmaps that the export offers.
fn carry_out(image: &ImageExport, change: BitmapChange) -> imgfmt::Result<Value> {
    match change {
        BitmapChange::Add { ref name, .. } => {
            let name = name.clone();
            image.image().bitmap_transaction(&[change])?;
            // Bitmap names may be invalid as context names.
            let context = MetaContextName::qemu_dirty_bitmap(&name).ok();
            let context = context.filter(|_| image.offer_bitmap(&name).is_ok());
            Ok(json!({ "context": context.as_ref().map(MetaContextName::as_str) }))
        }
        BitmapChange::Remove { ref name } => {
            let name = name.clone();
            let was_offered = image.withdraw_bitmap(&name);
            image.image().bitmap_transaction(&[change]).inspect_err(|_| {
                if was_offered {
                    // It may have been missing from the start, or have become unreliable.
                    let _ = image.offer_bitmap(&name);
                }
            })?;
            Ok(json!({}))
        }
        change => {
            image.image().bitmap_transaction(&[change])?;
            Ok(json!({}))
        }
    }
}

/// During a checkpoint its bitmaps must not be changed by others, and the bits recorded since its
/// start must not be mistaken for all changes.
fn refuse_if_frozen(disk: &ServedDisk, change: &BitmapChange) -> Result<(), Failure> {
    let bitmap = disk.checkpoint.as_ref().and_then(|checkpoint| checkpoint.bitmap.as_ref());
    let Some(bitmap) = bitmap else { return Ok(()) };
    let (changed, read) = match change {
        BitmapChange::Merge { into, from } => (into, Some(from)),
        BitmapChange::Remove { name }
        | BitmapChange::Clear { name }
        | BitmapChange::Enable { name }
        | BitmapChange::Disable { name } => (name, None),
        _ => return Ok(()),
    };
    let is_frozen = |name: &String| bitmap.name == *name || bitmap.frozen() == *name;
    let name = read.filter(|name| is_frozen(name)).or(Some(changed).filter(|name| is_frozen(name)));
    let Some(name) = name else { return Ok(()) };
    let message = format!("the bitmap '{name}' belongs to a checkpoint; end it first");
    Err(Failure::new(ErrorKind::InUse, message))
}
