//! Exports as storages of images.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use imgfmt::{
    Durability, ExtentKind, Format, GuestOffset, HostOffset, Image, OpenOptions, Storage,
};
use nbd_client::{Connector, Error, ExportStorage, MetaContextName, ReadChunk};
use nbd_server::export::{
    Durability as Wanted, Export, ExportEntry, ExportError, Filter, MemoryExport,
};
use nbd_server::{ExportRegistry, ListenAddress, Server, ServerConfig};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::common::{have, nbdkit, pattern};

const MIB: usize = 1 << 20;

/// Serves a disk until the runtime is dropped.
fn serve(disk: Arc<dyn Export>) -> (Runtime, TempDir, Connector) {
    let directory = tempfile::tempdir().unwrap();
    let runtime = Runtime::new().unwrap();
    let exports = ExportRegistry::new();
    exports.add("disk", ExportEntry::new(disk)).unwrap();
    let mut server = Server::new(ServerConfig::default(), exports);
    let address = ListenAddress::Unix(directory.path().join("s"));
    let bound = runtime.block_on(server.listen(&address)).unwrap().remove(0);
    runtime.spawn(server.serve(std::future::pending::<()>()));
    (runtime, directory, Connector::new(bound.uri("disk")))
}

#[test]
fn an_image_on_a_server_is_read_and_written() {
    let (_runtime, _directory, connector) = serve(Arc::new(MemoryExport::new(MIB as u64)));
    let storage = Arc::new(ExportStorage::open(&connector).unwrap());
    assert!(storage.is_writable() && storage.can_trim() && storage.reports_extents());
    let options = OpenOptions::new().format(Format::Raw).access(imgfmt::Access::ReadWrite);
    let image = Image::from_storage(storage.clone(), &options).unwrap();
    assert_eq!(image.size(), MIB as u64);
    image.write_at(GuestOffset::new(4096), &[7; 1000], Durability::Cached).unwrap();
    let mut got = [0; 1000];
    image.read_at(GuestOffset::new(4096), &mut got).unwrap();
    assert_eq!(got, [7; 1000]);
    let chunks = storage.read_chunks(0..8192).unwrap();
    assert_eq!(chunks.iter().map(ReadChunk::length).sum::<u64>(), 8192);
    let context = MetaContextName::base_allocation();
    let status = storage.status(&context, 0..MIB as u64).unwrap();
    assert!(status.len() > 1, "{status:?}");
    storage.trim(4096..8192, Durability::Fua).unwrap();
}

#[test]
fn requests_are_widened_to_the_blocks_of_the_server() {
    if !have("nbdkit") {
        return;
    }
    let runtime = Runtime::new().unwrap();
    let policy =
        ["--filter=blocksize-policy", "file", "{directory}/disk", "blocksize-minimum=4096"];
    let options = [&policy[..], &["blocksize-error-policy=error"]].concat();
    let peer = runtime.block_on(nbdkit(&options, &pattern(64 << 10)));
    let storage = ExportStorage::open(&peer.connector()).unwrap();
    assert_eq!(storage.capabilities().minimum_size, 4096);
    let mut model = pattern(64 << 10);
    let mut got = vec![0; 5000];
    storage.read_at(HostOffset::new(4000), &mut got).unwrap();
    assert_eq!(got, model[4000..9000]);
    storage.write_at(HostOffset::new(4090), &[1; 10_000], Durability::Cached).unwrap();
    model[4090..14_090].fill(1);
    let mut whole = vec![0; 64 << 10];
    assert_eq!(storage.read_at(HostOffset::new(0), &mut whole).unwrap(), 64 << 10);
    assert!(whole == model);
    let chunks = storage.read_chunks(4000..9000).unwrap();
    assert_eq!((chunks[0].offset(), chunks.iter().map(ReadChunk::length).sum()), (4000, 5000));
}

/// A disk whose writes wait for a word before they are carried out.
struct Gate {
    disk: MemoryExport,
    arrived: std::sync::Mutex<Sender<()>>,
    go_on: std::sync::Mutex<Receiver<()>>,
}

impl Filter for Gate {
    fn inner(&self) -> &dyn Export {
        &self.disk
    }

    fn may_block(&self, _: nbd_server::export::Operation) -> nbd_server::export::MayBlock {
        nbd_server::export::MayBlock::Yes
    }

    fn write_at(&self, offset: u64, data: &[u8], durability: Wanted) -> Result<(), ExportError> {
        self.arrived.lock().unwrap().send(()).unwrap();
        self.go_on.lock().unwrap().recv().unwrap();
        self.disk.write_at(offset, data, durability)
    }
}

#[test]
fn what_was_a_hole_while_a_write_was_under_way_is_data_after_it() {
    let (arrived, arrival) = channel();
    let (go_on, gate) = channel();
    let disk = MemoryExport::new(MIB as u64);
    let (_runtime, _directory, connector) =
        serve(Arc::new(Gate { disk, arrived: arrived.into(), go_on: gate.into() }));
    let storage = ExportStorage::open(&connector).unwrap();
    let kind = || storage.next_extent(HostOffset::new(0), MIB as u64).unwrap().kind;
    let data = vec![7; 128 << 10];
    std::thread::scope(|scope| {
        let writing =
            scope.spawn(|| storage.write_at(HostOffset::new(0), &data, Durability::Cached));
        arrival.recv().unwrap();
        assert_eq!(kind(), ExtentKind::Hole, "nothing is written yet");
        go_on.send(()).unwrap();
        writing.join().unwrap().unwrap();
    });
    assert_eq!(kind(), ExtentKind::Data);
}

#[test]
fn the_source_of_an_error_is_the_client_s() {
    let (_runtime, _directory, connector) = serve(Arc::new(MemoryExport::new(MIB as u64)));
    let storage = ExportStorage::open(&connector).unwrap();
    storage.client().clone().disconnect().unwrap();
    let error = storage.read_at(HostOffset::new(0), &mut [0; 512]).unwrap_err();
    let source = error.get_ref().and_then(|source| source.downcast_ref::<Error>());
    assert!(matches!(source, Some(Error::Closed)), "{error:?}");
    assert_eq!(error.kind(), io::ErrorKind::Other);
    let beyond = storage.write_at(HostOffset::new(MIB as u64), &[0; 512], Durability::Cached);
    assert_eq!(beyond.unwrap_err().kind(), io::ErrorKind::StorageFull);
}
