//! Changes to requests that the user asked for: discards that do nothing, zeroes that are found.

use std::sync::Arc;

use clap::ValueEnum;
use nbd_proto::wire::TransmissionFlags;
use nbd_server::export::{
    Durability, Export, ExportError, ExportInfo, Filter, Holes, Lookup, Mapped, Operation,
    Promptness, ReadMap, Speed, TryRead, TryWrite, ZeroMode,
};

use crate::commands::copy::zero::is_zero;

/// What becomes of space that a client does not need any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Discard {
    /// It is given back.
    #[default]
    Unmap,
    /// It is kept: discards do nothing.
    Ignore,
}

/// What becomes of written data that is all zero.
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

/// What becomes of requests; the default changes nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    pub(crate) discard: Discard,
    pub(crate) detect_zeroes: DetectZeroes,
    pub(crate) caching: Caching,
    pub(crate) multi_conn: MultiConn,
    pub(crate) waiting: Waiting,
}

/// An export with some of its requests changed.
struct Changed {
    inner: Arc<dyn Export>,
    discard: Discard,
    detect_zeroes: DetectZeroes,
    caching: Caching,
    multi_conn: MultiConn,
    waiting: Waiting,
}

/// The export itself if there is nothing to change.
pub(crate) fn filtered(inner: Arc<dyn Export>, changes: Changes) -> Arc<dyn Export> {
    if changes == Changes::default() {
        return inner;
    }
    let Changes { discard, detect_zeroes, caching, multi_conn, waiting } = changes;
    Arc::new(Changed { inner, discard, detect_zeroes, caching, multi_conn, waiting })
}

impl Changed {
    fn mode(&self, wanted: ZeroMode) -> ZeroMode {
        match self.discard {
            Discard::Unmap => wanted,
            Discard::Ignore => ZeroMode::NoHole,
        }
    }

    fn durable(&self, wanted: Durability) -> Durability {
        match self.caching {
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
        if self.multi_conn == MultiConn::Hidden {
            info.flags.remove(TransmissionFlags::CAN_MULTI_CONN);
        }
        info
    }

    fn try_read_at(
        &self,
        offset: u64,
        buffer: &mut [u8],
        holes: Holes,
    ) -> Result<TryRead, ExportError> {
        match self.waiting {
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
        match (self.waiting, lookup) {
            (Waiting::Everywhere, Lookup::Prompt) => Ok(Mapped::WouldBlock),
            _ => self.inner.map_read(offset, length, holes, lookup, map),
        }
    }

    fn promptness(&self, operation: Operation) -> Promptness {
        if self.waiting == Waiting::Everywhere {
            return Promptness::MayBlock;
        }
        match (operation, self.detect_zeroes) {
            (Operation::Write(..), DetectZeroes::On | DetectZeroes::Unmap) => Promptness::MayBlock,
            (Operation::Write(length, durability), _) => {
                self.inner.promptness(Operation::Write(length, self.durable(durability)))
            }
            (operation, _) => self.inner.promptness(operation),
        }
    }

    fn write_at(
        &self,
        offset: u64,
        data: &[u8],
        durability: Durability,
    ) -> Result<(), ExportError> {
        let durability = self.durable(durability);
        let mode = match self.detect_zeroes {
            DetectZeroes::Off => return self.inner.write_at(offset, data, durability),
            DetectZeroes::On => ZeroMode::NoHole,
            DetectZeroes::Unmap => self.mode(ZeroMode::MayPunch),
        };
        if is_zero(data) {
            self.inner.write_zeroes(offset, data.len() as u64, mode, Speed::Any, durability)
        } else {
            self.inner.write_at(offset, data, durability)
        }
    }

    fn try_write_at(&self, offset: u64, data: &[u8]) -> Result<TryWrite, ExportError> {
        if self.caching == Caching::Writethrough || self.waiting == Waiting::Everywhere {
            return Ok(TryWrite::WouldBlock);
        }
        match self.detect_zeroes {
            // Zeroes become another operation, which may wait.
            DetectZeroes::On | DetectZeroes::Unmap if is_zero(data) => Ok(TryWrite::WouldBlock),
            _ => self.inner.try_write_at(offset, data),
        }
    }

    fn trim(&self, offset: u64, length: u64, durability: Durability) -> Result<(), ExportError> {
        let durability = self.durable(durability);
        match (self.discard, durability) {
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

        fn promptness(&self, _: Operation) -> Promptness {
            Promptness::Prompt
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
    fn on_the_network_nothing_is_done_where_it_stands() {
        let changes = Changes { waiting: Waiting::Everywhere, ..Changes::default() };
        let export = filtered(Arc::new(Recorder::default()), changes);
        let write = Operation::Write(1, Durability::Cached);
        assert_eq!(export.promptness(write), Promptness::MayBlock);
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
