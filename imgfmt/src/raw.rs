//! Raw images: the file is the disk.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::layer::{Layer, Walk, WritableLayer};
use crate::mapping::{Content, FileSpan, Mapped};
use crate::ordered_lock::{OrderedMutex, rank};
use crate::probe::{PROBE_LENGTH, is_archive, probe};
use crate::storage::{Capabilities, Durability, Speed, Storage, TryWrite, ZeroMode};
use crate::units::{GuestOffset, GuestRange, HostOffset};
use crate::write_map::WriteMap;

/// Whether writes that make the first sector look like another format are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FirstSector {
    /// The caller gave the format raw: the guest may write anything.
    Free,
    /// The format was found by probing: see [`probe`](crate::probe).
    Guarded,
}

/// An open raw image. Its size is the one it had when it was opened.
#[derive(Debug)]
pub(crate) struct Raw {
    storage: Arc<dyn Storage>,
    /// [`Format::Raw`], or what the storage decrypts.
    format: Format,
    size: u64,
    /// Held while a guarded first sector is checked and changed.
    first_sector: Option<OrderedMutex<{ rank::FIRST_SECTOR }, ()>>,
}

impl Raw {
    pub(crate) fn new(storage: Arc<dyn Storage>, first_sector: FirstSector) -> Result<Self> {
        let size = storage.len().map_err(|error| Error::from_io("find the size of", error))?;
        let first_sector = match first_sector {
            FirstSector::Free => None,
            FirstSector::Guarded => Some(OrderedMutex::default()),
        };
        Ok(Self { storage, format: Format::Raw, size, first_sector })
    }

    /// The disk in an encrypted volume, which `storage` decrypts.
    #[cfg(feature = "encryption")]
    pub(crate) fn decrypted(storage: crate::crypto::Encrypted) -> Result<Self> {
        // What is in an encrypted volume is not probed.
        let raw = Self::new(Arc::new(storage), FirstSector::Free)?;
        Ok(Self { format: Format::Luks, ..raw })
    }

    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// Runs `change` if the image still looks raw afterwards. `apply` makes the same change to a
    /// copy of the first sector, from `offset` on.
    fn guarded(
        &self,
        offset: GuestOffset,
        apply: impl FnOnce(&mut [u8]),
        change: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some(lock) = &self.first_sector else { return change() };
        if offset.bytes() >= PROBE_LENGTH as u64 {
            return change();
        }
        let _held = lock.lock();
        let mut sector = [0; PROBE_LENGTH];
        let length = self.storage.read_at(HostOffset::new(0), &mut sector).map_err(io("read"))?;
        apply(&mut sector[offset.bytes() as usize..]);
        // A write past the present end of the file still belongs to the sector.
        let sector = &sector[..length.max(self.size.min(PROBE_LENGTH as u64) as usize)];
        match probe(sector) {
            Format::Raw if !is_archive(sector) => change(),
            _ => Err(Error::new(
                ErrorKind::PolicyDenied,
                "write to",
                "the first sector would then look like another image format or an archive, and this \
                 raw image was found by probing; open it with the format 'raw' given",
            )
            .at(offset.bytes())),
        }
    }

    /// The storage whose bytes are always the disk's, at the same offsets.
    pub(crate) fn storage(&self) -> &dyn Storage {
        &*self.storage
    }
}

impl Layer for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, range: GuestRange, walk: &mut Walk<'_>) -> Result<Mapped> {
        let file = FileSpan {
            storage: &self.storage,
            offset: host(range.offset()),
            may_pass_end: false,
            may_have_holes: false,
            is_file_content: self.format == Format::Raw,
        };
        walk.push_file(self, range, file, Content::Hole)
    }
}

impl WritableLayer for Raw {
    fn capabilities(&self) -> Capabilities {
        self.storage.capabilities()
    }

    fn write_at(&self, offset: GuestOffset, data: &[u8], durability: Durability) -> Result<()> {
        let apply = |sector: &mut [u8]| {
            let length = sector.len().min(data.len());
            sector[..length].copy_from_slice(&data[..length]);
        };
        self.guarded(offset, apply, || {
            self.storage
                .write_at(host(offset), data, durability)
                .map_err(io("write to"))
                .map_err(at(offset))
        })
    }

    fn try_write_at(&self, offset: GuestOffset, data: &[u8]) -> Result<TryWrite> {
        // The check of a guarded sector reads.
        if self.first_sector.is_some() && offset.bytes() < PROBE_LENGTH as u64 {
            return Ok(TryWrite::WouldBlock);
        }
        // Other storages may read what is around the data, or wait for a server.
        if self.format != Format::Raw || self.storage.as_fd().is_none() {
            let tried = self.storage.try_write_at(host(offset), data);
            return tried.map_err(io("write to")).map_err(at(offset));
        }
        self.write_at(offset, data, Durability::Cached)?;
        Ok(TryWrite::Complete)
    }

    fn map_write(&self, offset: GuestOffset, length: u64) -> Result<Option<WriteMap>> {
        if self.first_sector.is_some() && offset.bytes() < PROBE_LENGTH as u64 {
            return Ok(None);
        }
        Ok(WriteMap::new(&self.storage, host(offset), length).map(WriteMap::durable_alone))
    }

    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode, speed: Speed) -> Result<()> {
        self.guarded(range.offset(), zero_start(range), || {
            let result =
                self.storage.write_zeroes(host(range.offset()), range.length(), mode, speed);
            result.map_err(|error| match speed {
                Speed::FastOnly if error.kind() == std::io::ErrorKind::Unsupported => Error::new(
                    ErrorKind::NotFast,
                    "write zeroes to",
                    "this file or device has no fast way to do so; allow the slow one",
                ),
                _ => Error::from_io("write zeroes to", error),
            })
        })
        .map_err(at(range.offset()))
    }

    fn discard(&self, range: GuestRange) -> Result<()> {
        let result = self.guarded(range.offset(), zero_start(range), || {
            self.storage.punch_hole(host(range.offset()), range.length()).map_err(io("discard"))
        });
        match result {
            // A discard is advice: where it is impossible, nothing happens.
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            result => result.map_err(at(range.offset())),
        }
    }

    fn flush(&self) -> Result<()> {
        let synced = self.storage.sync();
        synced.map_err(|error| Error::from_io("flush", error).of_sync().for_writers())
    }

    fn resize(&mut self, size: u64) -> Result<()> {
        self.storage.set_len(size).map_err(io("resize"))?;
        self.storage.sync().map_err(io("resize"))?;
        self.size = size;
        Ok(())
    }
}

fn host(offset: GuestOffset) -> HostOffset {
    HostOffset::new(offset.bytes())
}

fn io(operation: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::from_io(operation, error)
}

fn at(offset: GuestOffset) -> impl Fn(Error) -> Error {
    move |error| error.at(offset.bytes())
}

/// Sets the bytes of a first sector to zero that a range covers.
fn zero_start(range: GuestRange) -> impl FnOnce(&mut [u8]) {
    move |sector| {
        let length = usize::try_from(range.length()).unwrap_or(usize::MAX).min(sector.len());
        sector[..length].fill(0);
    }
}
