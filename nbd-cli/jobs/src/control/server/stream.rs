//! Requests about streams.

use std::time::Instant;

use imgfmt::Access;
use nbd_proto::wire::MetaContextName;
use nbd_server::export::{Export as _, ImageExport};

use super::controller::{Controller, blocking};
use super::streaming::{StreamRequest, Streaming, TIME_TO_STOP};
use crate::control::{ErrorKind, Failure, StreamState};
use crate::text::printable;

/// Refuses disks that lose nothing, or too much, when the layers go. May block.
fn check(export: &str, is_kept: bool, image: &ImageExport) -> Result<(), Failure> {
    let refuse = |why: &str| {
        let message = format!("cannot stream into '{}': {why}", printable(export));
        Err(Failure::new(ErrorKind::InvalidRequest, message))
    };
    if image.image().access() == Access::ReadOnly {
        return refuse("it is served read-only");
    }
    if !is_kept {
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
        export: &str,
        request: StreamRequest,
    ) -> Result<StreamState, Failure> {
        let (turn, disks) = self.turn(export, self.patience).await?;
        let disk = disks.get(export)?;
        disk.refuse_streaming(export)?;
        let (image, is_kept) = (disk.image()?, disk.reopen.is_some());
        drop(disks);
        let (name, observer) = (export.to_owned(), self.observer.clone());
        let started = blocking(move || {
            check(&name, is_kept, &image)?;
            Ok::<_, Failure>((Streaming::start(&name, image, request, observer)?, turn))
        });
        let (streaming, _turn) = started.await??;
        let state = streaming.state();
        self.disks.lock().await.get_mut(export)?.streaming = Some(streaming);
        Ok(state)
    }

    /// Ends a stream, and waits until a read that is under way has ended.
    pub(super) async fn cancel_stream(&self, export: &str) -> Result<StreamState, Failure> {
        let disks = self.disks.lock().await;
        disks.refuse_if_suspended()?;
        let Some(streaming) = disks.get(export)?.streaming.as_ref() else {
            let message = format!("nothing is streamed into '{}'", printable(export));
            return Err(Failure::new(ErrorKind::NotFound, message));
        };
        let streaming = streaming.cancel("cancelled");
        drop(disks);
        if !streaming.ended(Instant::now() + TIME_TO_STOP).await {
            let message =
                "the stream ends as soon as a read of a layer below has ended, which hangs";
            return Err(Failure::new(ErrorKind::Failed, message));
        }
        Ok(streaming.state())
    }
}
