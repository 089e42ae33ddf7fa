//! Requests about streams.

use imgfmt::Access;
use nbd_proto::wire::MetaContextName;
use nbd_server::export::{Export as _, ImageExport};

use super::controller::{Controller, blocking};
use super::disks::{ServedDisk, ServedDisks};
use super::streaming::{StreamRequest, Streaming, TIME_TO_STOP};
use crate::control::{ErrorKind, Failure, StreamState};
use crate::text::printable;

/// Refuses disks that lose nothing, or too much, when the layers go.
fn check(export: &str, disk: &ServedDisk, image: &ImageExport) -> Result<(), Failure> {
    let refuse = |why: &str| {
        let message = format!("cannot stream into '{}': {why}", printable(export));
        Err(Failure::new(ErrorKind::InvalidRequest, message))
    };
    if image.image().access() == Access::ReadOnly {
        return refuse("it is served read-only");
    }
    if disk.reopen.is_none() {
        return refuse("it is in memory or temporary, and its changes are discarded at the end");
    }
    let info = image.image().info()?;
    let Some(own) = info.qcow2.map(|info| info.bitmaps) else {
        return refuse("only a qcow2 image can take what is below it");
    };
    let offered = image.info().meta_contexts;
    let mut offered = offered.iter().filter_map(MetaContextName::dirty_bitmap);
    match offered.find(|name| !own.iter().any(|bitmap| bitmap.name == **name)) {
        Some(name) => {
            refuse(&format!("the bitmap '{}' that it offers is below it", printable(name)))
        }
        None => Ok(()),
    }
}

impl Controller {
    pub(super) async fn start_stream(
        &self,
        disks: &mut ServedDisks,
        export: &str,
        request: StreamRequest,
    ) -> Result<StreamState, Failure> {
        let disk = disks.get_mut(export)?;
        disk.refuse_streaming(export)?;
        let image = disk.image()?;
        check(export, disk, &image)?;
        let (name, observer) = (export.to_owned(), self.observer.clone());
        let started = blocking(move || Streaming::start(&name, image, request, observer));
        let streaming = started.await??;
        let state = streaming.state();
        disk.streaming = Some(streaming);
        Ok(state)
    }

    /// Ends a stream, and waits until a read that is under way has ended.
    pub(super) async fn cancel_stream(
        &self,
        disks: &mut ServedDisks,
        export: &str,
    ) -> Result<StreamState, Failure> {
        let Some(streaming) = disks.get_mut(export)?.streaming.as_ref() else {
            let message = format!("nothing is streamed into '{}'", printable(export));
            return Err(Failure::new(ErrorKind::NotFound, message));
        };
        streaming.cancel("cancelled");
        if !streaming.ended(TIME_TO_STOP).await {
            let message =
                "the stream ends as soon as a read of a layer below has ended, which hangs";
            return Err(Failure::new(ErrorKind::Failed, message));
        }
        Ok(streaming.state())
    }
}
