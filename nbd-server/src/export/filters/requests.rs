//! [`RequestFilter`]: changes requests to an export.

use std::sync::Arc;

use nbd_proto::wire::{BlockSizes, TransmissionFlags};

use super::options::{
    AdvisedMinimum, Blocking, DetectZeroes, Discard, FilterOptions, Medium, MultiConn,
    PreferredSize, WriteCache, ZeroUnit,
};
use crate::export::{
    Durability, Export, ExportError, ExportInfo, Filter, Holes, Lookup, Mapped, MayBlock,
    MinimumBlockSize, Operation, PlacedRead, PlacedWrite, ReadMap, Speed, TryRead, TryWrite,
    ZeroMode,
};

/// The alignment of direct I/O and the smallest preferred block size for clients, in bytes.
const PAGE: u64 = 4096;

/// The advised alignment of requests, in bytes.
const SECTOR: u32 = 512;

impl FilterOptions {
    /// Wraps `inner` in a [`RequestFilter`]; returns `inner` itself if nothing is changed.
    #[must_use]
    pub fn apply(self, inner: Arc<dyn Export>) -> Arc<dyn Export> {
        if self == Self::default() {
            return inner;
        }
        Arc::new(RequestFilter::new(inner, self))
    }
}

/// An export whose requests are changed.
pub struct RequestFilter {
    inner: Arc<dyn Export>,
    options: FilterOptions,
}

impl std::fmt::Debug for RequestFilter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RequestFilter").field("options", &self.options).finish_non_exhaustive()
    }
}

impl RequestFilter {
    /// Creates an export that changes requests to `inner` according to `options`.
    #[must_use]
    pub fn new(inner: Arc<dyn Export>, options: FilterOptions) -> Self {
        Self { inner, options }
    }

    fn mode(&self, wanted: ZeroMode) -> ZeroMode {
        match self.options.discard {
            Discard::Unmap => wanted,
            Discard::Ignore => ZeroMode::KeepAllocated,
        }
    }

    /// The part of a request of zeroes that becomes a request to write zeroes.
    fn zero_part(&self, offset: u64, length: usize) -> (usize, usize) {
        match self.options.zero_unit {
            ZeroUnit::Byte => (0, length),
            ZeroUnit::Page => {
                let start = (offset.wrapping_neg() % PAGE) as usize;
                let beyond = (offset.saturating_add(length as u64) % PAGE) as usize;
                (start, length.saturating_sub(beyond))
            }
        }
    }

    fn durable(&self, wanted: Durability) -> Durability {
        match self.options.write_cache {
            WriteCache::Writeback => wanted,
            WriteCache::Writethrough => Durability::Fua,
        }
    }
}

impl Filter for RequestFilter {
    fn inner(&self) -> &dyn Export {
        &*self.inner
    }

    fn info(&self) -> ExportInfo {
        let mut info = self.inner.info();
        if self.options.multi_conn == MultiConn::Hidden {
            info.flags.remove(TransmissionFlags::CAN_MULTI_CONN);
        }
        if self.options.medium == Medium::Rotational {
            info.flags |= TransmissionFlags::ROTATIONAL;
        }
        if self.options.preferred_size == PreferredSize::Page {
            let (minimum, maximum) =
                (info.block_sizes.minimum(), info.block_sizes.maximum_payload());
            let preferred = minimum.max(PAGE as u32);
            info.block_sizes =
                BlockSizes::new(minimum, preferred, maximum).unwrap_or(info.block_sizes);
        }
        if self.options.advised_minimum == AdvisedMinimum::Sector && info.block_sizes.minimum() == 1
        {
            let sizes = info.block_sizes;
            let advised = BlockSizes::new(SECTOR, sizes.preferred(), sizes.maximum_payload());
            if let Ok(advised) = advised {
                info.block_sizes = advised;
                info.minimum_block_size = MinimumBlockSize::Advised;
            }
        }
        info
    }

    fn try_read_at(
        &self,
        offset: u64,
        buffer: &mut [u8],
        holes: Holes,
    ) -> Result<TryRead, ExportError> {
        match self.options.blocking {
            Blocking::Inherit => self.inner.try_read_at(offset, buffer, holes),
            Blocking::Always => Ok(TryRead::WouldBlock),
        }
    }

    fn map_read(
        &self,
        offset: u64,
        length: usize,
        holes: Holes,
        lookup: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        match (self.options.blocking, lookup) {
            (Blocking::Always, Lookup::CachedOnly) => Ok(Mapped::WouldBlock),
            _ => self.inner.map_read(offset, length, holes, lookup, map),
        }
    }

    fn place_read(&self, offset: u64, length: usize, holes: Holes) -> Option<Box<dyn PlacedRead>> {
        match self.options.blocking {
            Blocking::Inherit => self.inner.place_read(offset, length, holes),
            Blocking::Always => None,
        }
    }

    fn place_write(&self, offset: u64, length: usize) -> Option<Box<dyn PlacedWrite>> {
        match (self.options.blocking, self.options.detect_zeroes) {
            (Blocking::Inherit, DetectZeroes::Off) => self.inner.place_write(offset, length),
            _ => None,
        }
    }

    fn may_block(&self, operation: Operation) -> MayBlock {
        if self.options.blocking == Blocking::Always {
            return MayBlock::Yes;
        }
        match (operation, self.options.detect_zeroes) {
            (Operation::Write(..), DetectZeroes::On | DetectZeroes::Unmap) => MayBlock::Yes,
            (Operation::Write(length, durability), _) => {
                self.inner.may_block(Operation::Write(length, self.durable(durability)))
            }
            (operation, _) => self.inner.may_block(operation),
        }
    }

    fn is_writethrough(&self) -> bool {
        self.options.write_cache == WriteCache::Writethrough || self.inner.is_writethrough()
    }

    fn write_at(
        &self,
        offset: u64,
        data: &[u8],
        durability: Durability,
    ) -> Result<(), ExportError> {
        let durability = self.durable(durability);
        let mode = match self.options.detect_zeroes {
            DetectZeroes::Off => return self.inner.write_at(offset, data, durability),
            DetectZeroes::On => ZeroMode::KeepAllocated,
            DetectZeroes::Unmap => self.mode(ZeroMode::MayUnmap),
        };
        if !is_zero(data) {
            return self.inner.write_at(offset, data, durability);
        }
        let (start, end) = self.zero_part(offset, data.len());
        if start >= end {
            return self.inner.write_at(offset, data, durability);
        }
        let place = |position: usize| offset.saturating_add(position as u64);
        let (length, speed) = ((end - start) as u64, Speed::Any);
        self.inner.write_zeroes(place(start), length, mode, speed, durability)?;
        for (position, edge) in [(0, &data[..start]), (end, &data[end..])] {
            if !edge.is_empty() {
                self.inner.write_at(place(position), edge, durability)?;
            }
        }
        Ok(())
    }

    fn try_write_at(&self, offset: u64, data: &[u8]) -> Result<TryWrite, ExportError> {
        if self.options.write_cache == WriteCache::Writethrough
            || self.options.blocking == Blocking::Always
        {
            return Ok(TryWrite::WouldBlock);
        }
        match self.options.detect_zeroes {
            // Zeroes become another operation, which may wait.
            DetectZeroes::On | DetectZeroes::Unmap if is_zero(data) => Ok(TryWrite::WouldBlock),
            _ => self.inner.try_write_at(offset, data),
        }
    }

    fn trim(&self, offset: u64, length: u64, durability: Durability) -> Result<(), ExportError> {
        let durability = self.durable(durability);
        match (self.options.discard, durability) {
            (Discard::Unmap, _) => self.inner.trim(offset, length, durability),
            (Discard::Ignore, Durability::Cached) => Ok(()),
            // Earlier writes to the range must be durable nevertheless.
            (Discard::Ignore, _) => self.inner.flush(),
        }
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
        durability: Durability,
    ) -> Result<(), ExportError> {
        let (mode, durability) = (self.mode(mode), self.durable(durability));
        self.inner.write_zeroes(offset, length, mode, speed, durability)
    }
}

/// Whether all bytes are zero.
fn is_zero(data: &[u8]) -> bool {
    // Usually the first few bytes decide; the rest is folded without branches, which the compiler
    // turns into wide instructions.
    let (head, rest) = data.split_at(data.len().min(16));
    head.iter().all(|&byte| byte == 0)
        && rest.chunks(1024).all(|chunk| chunk.iter().fold(0, |sum, byte| sum | byte) == 0)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::export::FastExport;

    /// Notes how durable each change was asked to be.
    #[derive(Default)]
    struct Recorder(Mutex<Vec<(&'static str, Durability)>>);

    impl Recorder {
        fn note(&self, what: &'static str, durability: Durability) -> Result<(), ExportError> {
            self.0.lock().expect("nobody panicked").push((what, durability));
            Ok(())
        }
    }

    impl Export for Recorder {
        fn info(&self) -> ExportInfo {
            let mut info = ExportInfo::new(1 << 20);
            info.flags |= TransmissionFlags::CAN_MULTI_CONN;
            info
        }

        fn read_at(&self, _: u64, _: &mut [u8]) -> Result<(), ExportError> {
            Ok(())
        }

        fn write_at(&self, _: u64, _: &[u8], durability: Durability) -> Result<(), ExportError> {
            self.note("write", durability)
        }

        fn trim(&self, _: u64, _: u64, durability: Durability) -> Result<(), ExportError> {
            self.note("trim", durability)
        }

        fn write_zeroes(
            &self,
            _: u64,
            _: u64,
            _: ZeroMode,
            _: Speed,
            durability: Durability,
        ) -> Result<(), ExportError> {
            self.note("zeroes", durability)
        }

        fn fast(&self) -> Option<&dyn FastExport> {
            Some(self)
        }
    }

    impl FastExport for Recorder {
        fn may_block(&self, _: Operation) -> MayBlock {
            MayBlock::No
        }

        fn try_write_at(&self, _: u64, _: &[u8]) -> Result<TryWrite, ExportError> {
            self.note("write in place", Durability::Cached).map(|()| TryWrite::Complete)
        }
    }

    #[test]
    fn with_writethrough_every_change_is_durable_when_it_is_done() {
        let recorder = Arc::new(Recorder::default());
        let options =
            FilterOptions { write_cache: WriteCache::Writethrough, ..FilterOptions::default() };
        let export = options.apply(recorder.clone());
        export.write_at(0, &[1], Durability::Cached).expect("it is noted");
        export.trim(0, 1, Durability::Cached).expect("it is noted");
        let mode = ZeroMode::MayUnmap;
        export.write_zeroes(0, 1, mode, Speed::Any, Durability::Cached).expect("it is noted");
        assert_eq!(export.try_write_at(0, &[1]), Ok(TryWrite::WouldBlock));
        let noted = recorder.0.lock().expect("nobody panicked");
        let fua = Durability::Fua;
        assert_eq!(*noted, [("write", fua), ("trim", fua), ("zeroes", fua)]);
    }

    #[test]
    fn zeroes_are_looked_for_in_whole_pages_where_the_page_cache_is_bypassed() {
        let recorder = Arc::new(Recorder::default());
        let (detect_zeroes, zero_unit) = (DetectZeroes::Unmap, ZeroUnit::Page);
        let options = FilterOptions { detect_zeroes, zero_unit, ..FilterOptions::default() };
        let export = options.apply(recorder.clone());
        let cached = Durability::Cached;
        for (offset, length, expected) in [
            (0, 1, &["write"][..]),
            (4096, 8192, &["zeroes"]),
            (4095, 4097, &["zeroes", "write"]),
            (4095, 4100, &["zeroes", "write", "write"]),
            (1, 8000, &["write"]),
        ] {
            export.write_at(offset, &vec![0; length], cached).expect("it is noted");
            let noted = std::mem::take(&mut *recorder.0.lock().expect("nobody panicked"));
            let noted: Vec<_> = noted.into_iter().map(|(what, _)| what).collect();
            assert_eq!(noted, expected, "{offset} {length}");
        }
    }

    #[test]
    fn only_who_is_asked_says_that_a_disk_is_rotational_or_prefers_pages() {
        let export = Arc::new(Recorder::default());
        let (medium, preferred_size) = (Medium::Rotational, PreferredSize::Page);
        let options = FilterOptions { medium, preferred_size, ..FilterOptions::default() };
        let info = options.apply(export).info();
        assert!(info.flags.contains(TransmissionFlags::ROTATIONAL));
        assert_eq!(info.block_sizes.preferred(), 4096);
    }

    #[test]
    fn on_the_network_nothing_is_done_where_it_stands() {
        let options = FilterOptions { blocking: Blocking::Always, ..FilterOptions::default() };
        let export = options.apply(Arc::new(Recorder::default()));
        let write = Operation::Write(1, Durability::Cached);
        assert_eq!(export.may_block(write), MayBlock::Yes);
        assert_eq!(export.try_read_at(0, &mut [0], Holes::Told), Ok(TryRead::WouldBlock));
        let mut map = ReadMap::new();
        let mapped = export.map_read(0, 1, Holes::Told, Lookup::CachedOnly, &mut map);
        assert_eq!(mapped, Ok(Mapped::WouldBlock));
        assert_eq!(export.try_write_at(0, &[1]), Ok(TryWrite::WouldBlock));
    }

    #[test]
    fn several_connections_can_be_hidden() {
        let export = Arc::new(Recorder::default());
        for (multi_conn, expected) in [(MultiConn::Inherit, true), (MultiConn::Hidden, false)] {
            let options = FilterOptions { multi_conn, ..FilterOptions::default() };
            let flags = options.apply(export.clone()).info().flags;
            assert_eq!(flags.contains(TransmissionFlags::CAN_MULTI_CONN), expected);
        }
    }
}
