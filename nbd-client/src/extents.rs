//! Block status of a range of any length, as a stream.

use std::collections::VecDeque;
use std::ops::Range;

use nbd_proto::ApiMisuse;
use nbd_proto::transmission::ExtentLimit;
use nbd_proto::wire::{AllocationFlags, BlockDescriptor, DirtyFlags, MetaContextName};

use crate::client::Client;
use crate::error::Result;

/// A range with one status.
///
/// This plain value has these fields and will have no others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the export, in bytes.
    pub offset: u64,
    /// Length, in bytes; never zero.
    pub length: u64,
    /// Status flags; the context defines their meaning.
    pub flags: u64,
}

impl Extent {
    /// Returns the range, in bytes.
    #[must_use]
    pub const fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.length)
    }

    /// Returns true if the context is a dirty bitmap (`qemu:dirty-bitmap:NAME`) and the range is
    /// dirty.
    #[must_use]
    pub const fn is_dirty(&self) -> bool {
        DirtyFlags::from_bits_truncate(self.flags).contains(DirtyFlags::STATE_DIRTY)
    }

    /// Returns the status flags if the context is `base:allocation`.
    #[must_use]
    pub const fn allocation(&self) -> AllocationFlags {
        AllocationFlags::from_bits_truncate(self.flags)
    }
}

/// The extents of a range in ascending order and without gaps; neighbours differ in status.
///
/// Returned by [`Client::extents`]. Each request covers the rest of the range and accepts as many
/// extents as the server sends.
///
/// # Example
///
/// An incremental backup copies the ranges that a dirty bitmap of QEMU or `nbd-cli` marks:
///
/// ```
/// use std::ops::Range;
///
/// use nbd_client::{Connector, MetaContextName};
///
/// type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
///
/// async fn changed(uri: &str, bitmap: &str) -> Result<Vec<Range<u64>>> {
///     let context = MetaContextName::qemu_dirty_bitmap(bitmap)?;
///     let connector = uri.parse::<Connector>()?.meta_contexts([context.clone()]);
///     let client = connector.connect().await?;
///     let mut changed = Vec::new();
///     let mut extents = client.extents(&context, 0..client.info().size);
///     while let Some(extent) = extents.next().await {
///         let extent = extent?;
///         if extent.is_dirty() {
///             changed.push(extent.range());
///         }
///     }
///     client.disconnect().await?;
///     Ok(changed)
/// }
/// # use nbd_server::export::{Export, ExportEntry, ExportError, ExportInfo};
/// # use nbd_client::BlockDescriptor;
/// # struct Disk;
/// # impl Export for Disk {
/// #     fn info(&self) -> ExportInfo {
/// #         let mut info = ExportInfo::new(1 << 20);
/// #         info.meta_contexts = vec![MetaContextName::qemu_dirty_bitmap("monday").unwrap()];
/// #         info
/// #     }
/// #     fn read_at(&self, _: u64, _: &mut [u8]) -> std::result::Result<(), ExportError> {
/// #         Ok(())
/// #     }
/// #     fn block_status(
/// #         &self, _: &MetaContextName, _: u64, _: u64, _: usize,
/// #     ) -> std::result::Result<Vec<BlockDescriptor>, ExportError> {
/// #         let clean = BlockDescriptor { length: 4096, flags: 0 };
/// #         Ok(vec![clean, BlockDescriptor { length: 8192, flags: 1 }, BlockDescriptor { length: (1 << 20) - 12288, flags: 0 }])
/// #     }
/// # }
/// # let directory = tempfile::tempdir()?;
/// # let socket = nbd_server::ListenAddress::Unix(directory.path().join("s"));
/// # tokio::runtime::Runtime::new()?.block_on(async move {
/// # let exports = nbd_server::ExportRegistry::new();
/// # exports.add("", ExportEntry::new(std::sync::Arc::new(Disk)))?;
/// # let mut server = nbd_server::Server::new(nbd_server::ServerConfig::default(), exports);
/// # let uri = server.listen(&socket).await?.remove(0).uri("").to_string();
/// # let serving = tokio::spawn(server.serve(std::future::pending::<()>()));
///
/// let changed = changed(&uri, "monday").await?;
/// assert_eq!(changed, [4096..12288]);
/// # serving.abort();
/// # Result::Ok(())
/// # })?;
/// # Result::Ok(())
/// ```
#[derive(Debug)]
pub struct ExtentStream {
    client: Client,
    context: Option<usize>,
    /// The status bits that are defined for this context.
    known: u64,
    /// Start of the range.
    start: u64,
    /// Start of the next request.
    position: u64,
    end: u64,
    received: VecDeque<BlockDescriptor>,
    /// The extent that may still grow.
    current: Option<Extent>,
}

impl Client {
    /// Returns the extents of `range` in one context. The first request is sent by the first
    /// [`ExtentStream::next`].
    #[must_use]
    pub fn extents(&self, context: &MetaContextName, range: Range<u64>) -> ExtentStream {
        let known = match context.as_str() {
            // Section "`base:allocation` metadata context": unknown bits are ignored.
            MetaContextName::BASE_ALLOCATION => AllocationFlags::all().bits(),
            _ => u64::MAX,
        };
        ExtentStream {
            client: self.clone(),
            context: self.meta_contexts().iter().position(|name| name == context),
            known,
            start: range.start,
            position: range.start,
            end: range.end,
            received: VecDeque::new(),
            current: None,
        }
    }
}

impl ExtentStream {
    /// Returns the next extent; `None` at the end of the range, and after an error.
    ///
    /// # Errors
    ///
    /// [`Error::Misuse`](crate::Error::Misuse) if the context was not selected or the range exceeds
    /// the export; otherwise as for [`Client::block_status`].
    ///
    /// # Cancel safety
    ///
    /// Safe: no extent is lost.
    pub async fn next(&mut self) -> Option<Result<Extent>> {
        loop {
            if let Some(extent) = self.next_received() {
                return Some(Ok(extent));
            }
            if self.position == self.end {
                return self.current.take().map(Ok);
            }
            if let Err(error) = self.receive().await {
                self.position = self.end;
                self.current = None;
                return Some(Err(error));
            }
        }
    }

    /// Returns an extent that cannot grow any more.
    fn next_received(&mut self) -> Option<Extent> {
        // The start of the range, if there is no extent yet.
        let start = Extent { offset: self.start, length: 0, flags: 0 };
        while let Some(descriptor) = self.received.pop_front() {
            let flags = descriptor.flags & self.known;
            let current = self.current.get_or_insert(Extent { length: 0, flags, ..start });
            if current.flags == flags {
                current.length = current.length.saturating_add(descriptor.length);
                continue;
            }
            let next = Extent {
                offset: current.offset.saturating_add(current.length),
                length: descriptor.length,
                flags,
            };
            return Some(std::mem::replace(current, next));
        }
        None
    }

    async fn receive(&mut self) -> Result<()> {
        let what = "this metadata context (it was not selected, or the server does not have it)";
        let Some(context) = self.context else {
            return Err(ApiMisuse::NotNegotiated { what }.into());
        };
        let left = self.position..self.end;
        let statuses = self.client.status(left, ExtentLimit::Many, Some(context)).await?;
        let found = statuses.into_iter().find(|(other, _)| *other == context);
        // The state machine has checked that every context was answered.
        let Some((_, descriptors)) = found else {
            return Err(ApiMisuse::NotNegotiated { what }.into());
        };
        let covered = descriptors.iter().map(|descriptor| descriptor.length).sum::<u64>();
        self.position = self.position.saturating_add(covered).min(self.end);
        self.received.extend(descriptors);
        Ok(())
    }
}
