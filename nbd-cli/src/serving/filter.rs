//! Changes to requests that the user asked for: discards that do nothing, zeroes that are found.

use std::sync::Arc;

use clap::ValueEnum;
use nbd_jobs::copy::zero::is_zero;
use nbd_proto::wire::{BlockSizes, TransmissionFlags};
use nbd_server::export::{
    Durability, Export, ExportError, ExportInfo, Filter, Holes, Lookup, Mapped, MayBlock,
    Operation, ReadMap, Speed, TryRead, TryWrite, ZeroMode,
};

/// In bytes; what direct I/O is aligned to, and the least unit that clients are told to prefer.
const PAGE: u64 = 4096;

/// What becomes of space that a client does not need any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Discard {
    /// It is given back.
    #[default]
    Unmap,
    /// It is kept: discards do nothing.
    Ignore,
}

/// What to do with written data that is all zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DetectZeroes {
    /// It is written.
    #[default]
    Off,
    /// The quickest way to make zeroes is taken; space is kept.
    On,
    /// Space is given back where that makes zeroes.
    Unmap,
}

/// When a write counts as done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Caching {
    /// When it is in a cache; flushes make it durable.
    #[default]
    Writeback,
    /// When it is durable.
    Writethrough,
}

/// What is told about several connections of one client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum MultiConn {
    /// What the export says.
    #[default]
    AsItIs,
    /// That there are none.
    Hidden,
}

/// Where requests are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Waiting {
    /// As the export says.
    #[default]
    AsItIs,
    /// On threads that may wait: the disk is on the network, whatever kind of image it is.
    Everywhere,
}

/// What clients are told about the medium.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Medium {
    /// Nothing.
    #[default]
    Unsaid,
    /// It is a spinning disk.
    Rotational,
}

/// Which parts of a request are examined for zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ZeroUnit {
    /// All bytes.
    #[default]
    Byte,
    /// Whole pages, as where the page cache is bypassed; the edges are written as data.
    Page,
}

/// The unit that is recommended to clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum PreferredSize {
    /// What costs least.
    #[default]
    AsItIs,
    /// A page, whatever the image.
    Page,
}

/// What becomes of requests; the default changes nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    pub(crate) discard: Discard,
    pub(crate) detect_zeroes: DetectZeroes,
    pub(crate) caching: Caching,
    pub(crate) multi_conn: MultiConn,
    pub(crate) waiting: Waiting,
    pub(crate) medium: Medium,
    pub(crate) zero_unit: ZeroUnit,
    pub(crate) preferred_size: PreferredSize,
}

/// An export with some of its requests changed.
struct Changed {
    inner: Arc<dyn Export>,
    changes: Changes,
}

/// The export itself if there is nothing to change.
pub(crate) fn filtered(inner: Arc<dyn Export>, changes: Changes) -> Arc<dyn Export> {
    if changes == Changes::default() {
        return inner;
    }
    Arc::new(Changed { inner, changes })
}

impl Changed {
    fn mode(&self, wanted: ZeroMode) -> ZeroMode {
        match self.changes.discard {
            Discard::Unmap => wanted,
            Discard::Ignore => ZeroMode::NoHole,
        }
    }

    /// The part of a request of zeroes that becomes a request to write zeroes.
    fn zero_part(&self, offset: u64, length: usize) -> (usize, usize) {
        match self.changes.zero_unit {
            ZeroUnit::Byte => (0, length),
            ZeroUnit::Page => {
                let start = (offset.wrapping_neg() % PAGE) as usize;
                let beyond = (offset.saturating_add(length as u64) % PAGE) as usize;
                (start, length.saturating_sub(beyond))
            }
        }
    }

    fn durable(&self, wanted: Durability) -> Durability {
        match self.changes.caching {
            Caching::Writeback => wanted,
            Caching::Writethrough => Durability::Fua,
        }
    }
}

impl Filter for Changed {
    fn inner(&self) -> &dyn Export {
        &*self.inner
    }

    fn info(&self) -> ExportInfo {
        let mut info = self.inner.info();
        if self.changes.multi_conn == MultiConn::Hidden {
            info.flags.remove(TransmissionFlags::CAN_MULTI_CONN);
        }
        if self.changes.medium == Medium::Rotational {
            info.flags |= TransmissionFlags::ROTATIONAL;
        }
        if self.changes.preferred_size == PreferredSize::Page {
            let (minimum, maximum) =
                (info.block_sizes.minimum(), info.block_sizes.maximum_payload());
            let preferred = minimum.max(PAGE as u32);
            info.block_sizes =
                BlockSizes::new(minimum, preferred, maximum).unwrap_or(info.block_sizes);
        }
        info
    }

    fn try_read_at(
        &self,
        offset: u64,
        buffer: &mut [u8],
        holes: Holes,
    ) -> Result<TryRead, ExportError> {
        match self.changes.waiting {
            Waiting::AsItIs => self.inner.try_read_at(offset, buffer, holes),
            Waiting::Everywhere => Ok(TryRead::WouldBlock),
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
        match (self.changes.waiting, lookup) {
            (Waiting::Everywhere, Lookup::Prompt) => Ok(Mapped::WouldBlock),
            _ => self.inner.map_read(offset, length, holes, lookup, map),
        }
    }

    fn may_block(&self, operation: Operation) -> MayBlock {
        if self.changes.waiting == Waiting::Everywhere {
            return MayBlock::Yes;
        }
        match (operation, self.changes.detect_zeroes) {
            (Operation::Write(..), DetectZeroes::On | DetectZeroes::Unmap) => MayBlock::Yes,
            (Operation::Write(length, durability), _) => {
                self.inner.may_block(Operation::Write(length, self.durable(durability)))
            }
            (operation, _) => self.inner.may_block(operation),
        }
    }

    fn write_at(
        &self,
        offset: u64,
        data: &[u8],
        durability: Durability,
    ) -> Result<(), ExportError> {
        let durability = self.durable(durability);
        let mode = match self.changes.detect_zeroes {
            DetectZeroes::Off => return self.inner.write_at(offset, data, durability),
            DetectZeroes::On => ZeroMode::NoHole,
            DetectZeroes::Unmap => self.mode(ZeroMode::MayPunch),
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
        if self.changes.caching == Caching::Writethrough
            || self.changes.waiting == Waiting::Everywhere
        {
            return Ok(TryWrite::WouldBlock);
        }
        match self.changes.detect_zeroes {
            // Zeroes become another operation, which may wait.
            DetectZeroes::On | DetectZeroes::Unmap if is_zero(data) => Ok(TryWrite::WouldBlock),
            _ => self.inner.try_write_at(offset, data),
        }
    }

    fn trim(&self, offset: u64, length: u64, durability: Durability) -> Result<(), ExportError> {
        let durability = self.durable(durability);
        match (self.changes.discard, durability) {
            (Discard::Unmap, _) => self.inner.trim(offset, length, durability),
            (Discard::Ignore, Durability::Cached) => Ok(()),
            // What was written to the range before must be durable all the same.
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use nbd_server::export::ExportInfo;

    use super::*;

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

        fn may_block(&self, _: Operation) -> MayBlock {
            MayBlock::No
        }

        fn write_at(&self, _: u64, _: &[u8], durability: Durability) -> Result<(), ExportError> {
            self.note("write", durability)
        }

        fn try_write_at(&self, _: u64, _: &[u8]) -> Result<TryWrite, ExportError> {
            self.note("write in place", Durability::Cached).map(|()| TryWrite::Complete)
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
    }

    #[test]
    fn with_writethrough_every_change_is_durable_when_it_is_done() {
        let recorder = Arc::new(Recorder::default());
        let changes = Changes { caching: Caching::Writethrough, ..Changes::default() };
        let export = filtered(recorder.clone(), changes);
        export.write_at(0, &[1], Durability::Cached).expect("it is noted");
        export.trim(0, 1, Durability::Cached).expect("it is noted");
        let mode = ZeroMode::MayPunch;
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
        let changes = Changes { detect_zeroes, zero_unit, ..Changes::default() };
        let export = filtered(recorder.clone(), changes);
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
        let changes = Changes { medium, preferred_size, ..Changes::default() };
        let info = filtered(export, changes).info();
        assert!(info.flags.contains(TransmissionFlags::ROTATIONAL));
        assert_eq!(info.block_sizes.preferred(), 4096);
    }

    #[test]
    fn on_the_network_nothing_is_done_where_it_stands() {
        let changes = Changes { waiting: Waiting::Everywhere, ..Changes::default() };
        let export = filtered(Arc::new(Recorder::default()), changes);
        let write = Operation::Write(1, Durability::Cached);
        assert_eq!(export.may_block(write), MayBlock::Yes);
        assert_eq!(export.try_read_at(0, &mut [0], Holes::Told), Ok(TryRead::WouldBlock));
        let mut map = ReadMap::new();
        let mapped = export.map_read(0, 1, Holes::Told, Lookup::Prompt, &mut map);
        assert_eq!(mapped, Ok(Mapped::WouldBlock));
        assert_eq!(export.try_write_at(0, &[1]), Ok(TryWrite::WouldBlock));
    }

    #[test]
    fn several_connections_can_be_hidden() {
        let export = Arc::new(Recorder::default());
        for (multi_conn, expected) in [(MultiConn::AsItIs, true), (MultiConn::Hidden, false)] {
            let changes = Changes { multi_conn, ..Changes::default() };
            let flags = filtered(export.clone(), changes).info().flags;
            assert_eq!(flags.contains(TransmissionFlags::CAN_MULTI_CONN), expected);
        }
    }
}
