//! Re-exported exports of other servers.

use std::sync::Arc;

use imgfmt::{Format, Image};
use nbd_client::{Connector, ExportStorage, ReadChunk};
use nbd_proto::NbdUri;
use nbd_proto::wire::{BlockDescriptor, Errno, MetaContextName, TransmissionFlags};
use nbd_server::export::filters::Blocking;
use nbd_server::export::{
    Durability, Export, ExportError, ExportInfo, Filter, Holes, Lookup, Mapped, ReadMap,
};

use super::error::OpenError;
use super::options::{OfferedBitmaps, OpenedExport, ServeOptions, Writes};
use crate::error::{JobError, JobErrorKind};
use crate::remote::run_elsewhere;
use crate::text::printable;

impl ServeOptions {
    /// Makes an export of the image on another server. Blocks, so asynchronous tasks must not call
    /// it.
    ///
    /// The metadata contexts selected by `allocation_depth` and `bitmaps` are those of the other
    /// server if its export is a raw disk, and those of the image on it otherwise.
    ///
    /// # Errors
    ///
    /// [`OpenError`] if the server cannot be used as wanted or has no such bitmap.
    pub fn open_export(&self, uri: &NbdUri) -> Result<OpenedExport, OpenError> {
        let connector = self.remotes.connector(uri);
        let contexts = self.contexts(&connector)?;
        let storage = Arc::new(self.remotes.open_with(connector.meta_contexts(contexts))?);
        if self.writes == Writes::ToImage && self.snapshot.is_none() && !storage.is_writable() {
            let why = format!("{uri} is exported read-only; add --read-only or --temporary");
            return Err(JobError::new(JobErrorKind::Source, why).into());
        }
        let image = self.open_storage(storage.clone())?;
        let mut options = self.clone();
        options.filter.blocking = Blocking::Always;
        if image.format() != Format::Raw {
            return Ok(options.exported(image)?);
        }
        let base = MetaContextName::base_allocation();
        let offered = storage.client().meta_contexts().iter().filter(|context| **context != base);
        let contexts: Vec<_> = offered.cloned().collect();
        if let OfferedBitmaps::Named(names) = &self.bitmaps {
            let is_offered = |name: &str| contexts.iter().any(|it| it.dirty_bitmap() == Some(name));
            if let Some(missing) = names.iter().find(|name| !is_offered(name)) {
                let missing = printable(missing);
                let why = format!("{uri}: the server does not offer the bitmap '{missing}'");
                return Err(JobError::new(JobErrorKind::Source, why).into());
            }
        }
        options.allocation_depth = false;
        options.bitmaps = OfferedBitmaps::default();
        let upstream = |inner| {
            let trim = storage.can_trim();
            Arc::new(Upstream { inner, storage, contexts, trim }) as Arc<dyn Export>
        };
        Ok(options.exported_through(image, upstream)?)
    }

    /// Makes an export of an image; a raw image that fills another server's export uses that
    /// server's information about zeroes.
    ///
    /// # Errors
    ///
    /// If the image does not contain the selected part.
    pub fn export_of(
        &self,
        image: Image,
        storage: Option<Arc<ExportStorage>>,
    ) -> Result<Arc<dyn Export>, JobError> {
        let Some(storage) = storage.filter(|_| image.format() == Format::Raw) else {
            return self.export(image);
        };
        let upstream = |inner| {
            // As in QEMU, a discard is offered even if it has no effect.
            let upstream = Upstream { inner, storage, contexts: Vec::new(), trim: true };
            Arc::new(upstream) as Arc<dyn Export>
        };
        Ok(self.exported_through(image, upstream)?.export)
    }

    /// Returns the contexts to request from the other server.
    fn contexts(&self, connector: &Connector) -> Result<Vec<MetaContextName>, JobError> {
        let mut contexts = Vec::new();
        if self.allocation_depth {
            contexts.push(MetaContextName::qemu_allocation_depth());
        }
        match &self.bitmaps {
            OfferedBitmaps::Named(names) => {
                for name in names {
                    let context = MetaContextName::qemu_dirty_bitmap(name);
                    contexts.push(context.map_err(|error| JobError::invalid(error.to_string()))?);
                }
            }
            OfferedBitmaps::All => {
                let queries = ["qemu:".to_owned()];
                let listed = run_elsewhere(connector.list_meta_contexts(&queries));
                // Contexts that the server does not list are not requested.
                let listed = listed.ok().and_then(Result::ok).unwrap_or_default();
                contexts.extend(listed.into_iter().filter(|it| it.dirty_bitmap().is_some()));
            }
        }
        Ok(contexts)
    }
}

/// Longest range that is mapped at a time, in bytes: its data is in memory then.
const MAP_LEN: usize = 4 << 20;

/// A raw disk on another server, with information that only that server has.
struct Upstream {
    inner: Arc<dyn Export>,
    storage: Arc<ExportStorage>,
    contexts: Vec<MetaContextName>,
    /// Whether discards are offered.
    trim: bool,
}

impl Upstream {
    /// Whether a context is answered by the other server. Its earlier answers are not reused:
    /// others may have written to its disk in the meantime.
    fn hands_on(&self, context: &MetaContextName) -> bool {
        self.contexts.contains(context)
            || self.storage.reports_extents() && *context == MetaContextName::base_allocation()
    }
}

impl Filter for Upstream {
    fn inner(&self) -> &dyn Export {
        &*self.inner
    }

    fn info(&self) -> ExportInfo {
        let mut info = self.inner.info();
        info.meta_contexts.extend(self.contexts.iter().cloned());
        let is_writable = !info.flags.contains(TransmissionFlags::READ_ONLY);
        info.flags.set(TransmissionFlags::SEND_TRIM, is_writable && self.trim);
        info
    }

    /// One request for the other server's answers on zeroes and on data.
    fn map_read(
        &self,
        offset: u64,
        length: usize,
        holes: Holes,
        lookup: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        match (holes, lookup) {
            (_, Lookup::CachedOnly) => return Ok(Mapped::WouldBlock),
            (Holes::AsData, _) => map.push_export(length),
            (Holes::Told, _) => {
                let end = offset + length.min(MAP_LEN) as u64;
                let chunks = self.storage.read_chunks(offset..end);
                for chunk in chunks.map_err(|error| failed(&error))? {
                    match chunk {
                        ReadChunk::Data { data, .. } => map.push_bytes(data),
                        ReadChunk::Hole { length, .. } => map.push_zero(length as usize),
                    }
                }
                if length > MAP_LEN {
                    return Ok(Mapped::Partial);
                }
            }
        }
        Ok(Mapped::Complete)
    }

    fn trim(&self, offset: u64, length: u64, durability: Durability) -> Result<(), ExportError> {
        if !self.storage.can_trim() {
            return Ok(());
        }
        let durability = match durability {
            Durability::Cached => imgfmt::Durability::Cached,
            Durability::Fua => imgfmt::Durability::Fua,
        };
        self.storage.trim(offset..offset + length, durability).map_err(|error| failed(&error))
    }

    fn block_status(
        &self,
        context: &MetaContextName,
        offset: u64,
        length: u64,
        max_count: usize,
    ) -> Result<Vec<BlockDescriptor>, ExportError> {
        if !self.hands_on(context) {
            return self.inner.block_status(context, offset, length, max_count);
        }
        let status = self.storage.status(context, offset..offset + length);
        let mut status = status.map_err(|error| failed(&error))?;
        status.truncate(max_count);
        Ok(status)
    }
}

fn failed(error: &std::io::Error) -> ExportError {
    tracing::warn!(%error, "the other server refuses a request");
    ExportError::new(Errno::EIO, "the upstream server cannot do this")
}
