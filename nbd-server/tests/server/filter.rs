//! Exports in front of others.

use std::sync::{Arc, Mutex};

use nbd_proto::wire::{BlockDescriptor, Errno, MetaContextName};
use nbd_server::export::{
    Durability, Export, ExportError, ExportInfo, FastExport, Filter, Holes, Lookup, Mapped,
    MayBlock, Operation, ReadMap, Speed, TryRead, TryWrite, ZeroMode,
};

use crate::support::{Client, MODES, TestServer};

const SIZE: u64 = 12_345;

/// Notes what it is asked, and answers unlike any default.
#[derive(Default)]
struct Noting(Mutex<Vec<String>>);

impl Noting {
    fn note(&self, call: String) {
        self.0.lock().unwrap().push(call);
    }
}

fn failure() -> ExportError {
    ExportError::new(Errno::EIO, "as it was told")
}

impl Export for Noting {
    fn info(&self) -> ExportInfo {
        self.note("info".into());
        ExportInfo::new(SIZE)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        self.note(format!("read {offset} {}", buffer.len()));
        buffer.fill(7);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8], how: Durability) -> Result<(), ExportError> {
        self.note(format!("write {offset} {data:?} {how:?}"));
        Ok(())
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.note("flush".into());
        Err(failure())
    }

    fn trim(&self, offset: u64, length: u64, how: Durability) -> Result<(), ExportError> {
        self.note(format!("trim {offset} {length} {how:?}"));
        Ok(())
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
        how: Durability,
    ) -> Result<(), ExportError> {
        self.note(format!("zeroes {offset} {length} {mode:?} {speed:?} {how:?}"));
        Ok(())
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        self.note(format!("cache {offset} {length}"));
        Ok(())
    }

    fn block_status(
        &self,
        context: &MetaContextName,
        offset: u64,
        length: u64,
        max_count: usize,
    ) -> Result<Vec<BlockDescriptor>, ExportError> {
        self.note(format!("status {context} {offset} {length} {max_count}"));
        Ok(vec![BlockDescriptor { length, flags: 9 }])
    }

    fn fast(&self) -> Option<&dyn FastExport> {
        Some(self)
    }
}

impl FastExport for Noting {
    fn try_read_at(
        &self,
        offset: u64,
        buffer: &mut [u8],
        holes: Holes,
    ) -> Result<TryRead, ExportError> {
        self.note(format!("try read {offset} {} {holes:?}", buffer.len()));
        Ok(TryRead::Complete)
    }

    fn map_read(
        &self,
        offset: u64,
        length: usize,
        holes: Holes,
        lookup: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        self.note(format!("map {offset} {length} {holes:?} {lookup:?}"));
        map.push_zero(length);
        Ok(Mapped::Complete)
    }

    fn may_block(&self, operation: Operation) -> MayBlock {
        self.note(format!("may_block {operation:?}"));
        MayBlock::No
    }

    fn try_write_at(&self, offset: u64, data: &[u8]) -> Result<TryWrite, ExportError> {
        self.note(format!("try write {offset} {data:?}"));
        Ok(TryWrite::Complete)
    }
}

/// Changes nothing.
struct Nothing(Arc<Noting>);

impl Filter for Nothing {
    fn inner(&self) -> &dyn Export {
        &*self.0
    }
}

/// Turns every bit that is read.
struct Inverted(Arc<Noting>);

impl Filter for Inverted {
    fn inner(&self) -> &dyn Export {
        &*self.0
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        self.inner().read_at(offset, buffer)?;
        buffer.iter_mut().for_each(|byte| *byte = !*byte);
        Ok(())
    }

    fn try_read_at(&self, _: u64, _: &mut [u8], _: Holes) -> Result<TryRead, ExportError> {
        Ok(TryRead::WouldBlock)
    }

    fn map_read(
        &self,
        _: u64,
        length: usize,
        _: Holes,
        _: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        map.push_export(length);
        Ok(Mapped::Complete)
    }
}

/// Calls everything there is, and returns what was asked and answered.
fn use_it(export: &dyn Export, noting: &Noting) -> Vec<String> {
    let context = MetaContextName::base_allocation();
    let (mut short, mut long) = ([0; 3], [0; 5]);
    let mut map = ReadMap::new();
    let durable = Durability::Fua;
    let mut said = vec![
        format!("{:?}", export.info()),
        format!("{:?}", export.read_at(1, &mut short)),
        format!("{:?}", export.try_read_at(2, &mut long, Holes::Told)),
        format!("{:?}", export.map_read(3, 4, Holes::Told, Lookup::MayRead, &mut map)),
        format!("{map:?}"),
        format!("{:?}", export.may_block(Operation::Write(5, durable))),
        format!("{:?}", export.write_at(6, &[7], durable)),
        format!("{:?}", export.try_write_at(8, &[9])),
        format!("{:?}", export.flush()),
        format!("{:?}", export.trim(10, 11, durable)),
        format!(
            "{:?}",
            export.write_zeroes(12, 13, ZeroMode::KeepAllocated, Speed::FastOnly, durable)
        ),
        format!("{:?}", export.cache(14, 15)),
        format!("{:?}", export.block_status(&context, 16, 17, 18)),
    ];
    said.append(&mut noting.0.lock().unwrap());
    said
}

#[test]
fn a_filter_that_changes_nothing_passes_every_call_and_every_answer_on() {
    let noting = Arc::new(Noting::default());
    let direct = use_it(&*noting, &noting);
    assert_eq!(direct.len(), 25, "{direct:?}");
    assert_eq!(use_it(&Nothing(Arc::clone(&noting)), &noting), direct);
}

#[test]
fn clients_see_what_a_filter_makes_of_the_disk() {
    let server = TestServer::of(Inverted(Arc::new(Noting::default())));
    let mut client = Client::connect(&server, MODES[0]);
    assert_eq!(client.read(100, 10), [!7; 10]);
}
