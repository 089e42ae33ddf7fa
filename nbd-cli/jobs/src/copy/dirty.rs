//! The changes in a server's dirty bitmap, and the zeroes among them.

use nbd_client::{Client, Extent, ExtentStream};
use nbd_proto::wire::MetaContextName;

use super::content::{Content, allocated};
use crate::error::JobError;

/// Block status is requested in windows of this size, and only where something is dirty: a server
/// should not walk the tables of a whole disk for a few changes. In bytes.
const WINDOW: u64 = 4 << 30;

/// Set in the status of a dirty range.
const DIRTY: u64 = 1;

/// The extents of a dirty bitmap, and the allocation of the dirty ones.
pub(crate) struct DirtyExtents {
    client: Client,
    bitmap: ExtentStream,
    /// The latest extent of the bitmap.
    current: Extent,
    /// The allocation from there on, if the server reports it.
    allocation: Option<MetaContextName>,
    window: Option<(ExtentStream, u64)>,
    /// The latest extent of the allocation.
    known: Option<Extent>,
}

impl DirtyExtents {
    /// Creates the iterator from `start` (in bytes) on. The client must have selected `bitmap`.
    pub(crate) fn new(client: Client, bitmap: &MetaContextName, start: u64) -> Self {
        let allocation = MetaContextName::base_allocation();
        let allocation = client.meta_contexts().contains(&allocation).then_some(allocation);
        let bitmap = client.extents(bitmap, start..client.info().size);
        let current = Extent { offset: start, length: 0, flags: 0 };
        Self { client, bitmap, current, allocation, window: None, known: None }
    }

    /// Returns the end (above `at`) and the content of the extent that starts at the byte `at`.
    /// Calls must ascend.
    pub(super) async fn at(&mut self, at: u64, size: u64) -> Result<(u64, Content), JobError> {
        while end_of(&self.current) <= at {
            match self.bitmap.next().await {
                Some(Ok(extent)) => self.current = extent,
                Some(Err(error)) => {
                    return Err(JobError::source(format!(
                        "the server cannot tell what is dirty at offset {at}: {error}"
                    )));
                }
                // The server reports no more: the rest may have changed.
                None => self.current = Extent { offset: at, length: size - at, flags: DIRTY },
            }
        }
        let end = end_of(&self.current).min(size);
        if self.current.flags & DIRTY == 0 {
            return Ok((end, Content::Unchanged));
        }
        let (known, content) = self.allocation_at(at, end).await?;
        Ok((known.min(end), content))
    }

    async fn allocation_at(&mut self, at: u64, end: u64) -> Result<(u64, Content), JobError> {
        let Some(context) = &self.allocation else { return Ok((end, Content::Data)) };
        loop {
            if let Some(known) = &self.known
                && known.offset <= at
                && end_of(known) > at
            {
                return Ok((end_of(known), allocated(known)));
            }
            let inside = self.window.as_ref().is_some_and(|(_, window_end)| *window_end > at);
            if !inside {
                let window_end = at.saturating_add(WINDOW).min(self.client.info().size);
                self.window = Some((self.client.extents(context, at..window_end), window_end));
            }
            let Some((window, window_end)) = &mut self.window else {
                return Ok((end, Content::Data));
            };
            match window.next().await {
                Some(Ok(extent)) => self.known = Some(extent),
                Some(Err(error)) => {
                    return Err(JobError::source(format!(
                        "the server cannot tell its holes at offset {at}: {error}"
                    )));
                }
                // The server reports no more of this window, which is then read.
                None => return Ok((*window_end, Content::Data)),
            }
        }
    }
}

fn end_of(extent: &Extent) -> u64 {
    extent.offset.saturating_add(extent.length)
}
