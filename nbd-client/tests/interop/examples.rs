//! The examples of the crate, against this workspace's server.

use std::sync::Arc;

use nbd_client::{BlockDescriptor, DirtyFlags, MetaContextName};
use nbd_server::export::{Export, ExportEntry, ExportError, ExportInfo};
use nbd_server::{ExportRegistry, ListenAddress, RunningServer, Server, ServerConfig};

#[path = "../../examples/dirty_bits.rs"]
#[allow(dead_code)] // Its main function is not called.
mod dirty_bits;
#[path = "../../examples/read_disk.rs"]
#[allow(dead_code)] // Its main function is not called.
mod read_disk;

/// A disk of 1 MiB of which the bitmap "monday" marks the third and fourth KiB.
struct Disk;

const SIZE: u64 = 1 << 20;

impl Export for Disk {
    fn info(&self) -> ExportInfo {
        let mut info = ExportInfo::new(SIZE);
        info.meta_contexts = vec![MetaContextName::qemu_dirty_bitmap("monday").unwrap()];
        info
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> Result<(), ExportError> {
        Ok(())
    }

    fn block_status(
        &self,
        _: &MetaContextName,
        offset: u64,
        length: u64,
        _: usize,
    ) -> Result<Vec<BlockDescriptor>, ExportError> {
        let dirty = DirtyFlags::STATE_DIRTY.bits();
        let parts = [(2048, 0), (4096, dirty), (SIZE, 0)].map(|(end, flags)| BlockDescriptor {
            length: end.clamp(offset, offset + length),
            flags,
        });
        let mut start = offset;
        let lengths = parts.map(|part| {
            let length = part.length - start;
            start = part.length;
            BlockDescriptor { length, ..part }
        });
        Ok(lengths.into_iter().filter(|part| part.length > 0).collect())
    }
}

async fn serve(directory: &std::path::Path) -> RunningServer {
    let exports = ExportRegistry::new();
    exports.add("disk", ExportEntry::new(Arc::new(Disk))).unwrap();
    let mut server = Server::new(ServerConfig::default(), exports);
    server.listen(&ListenAddress::Unix(directory.join("socket"))).await.unwrap();
    server.start()
}

#[test]
fn dirty_bits_example_tells_the_ranges_that_a_bitmap_marks() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let server = runtime.block_on(serve(directory.path()));
    let uri = server.addresses()[0].uri("disk").to_string();
    let dirty = dirty_bits::run(&uri, "monday").unwrap();
    assert_eq!(
        dirty.iter().map(|range| (range.start, range.end)).collect::<Vec<_>>(),
        [(2048, 4096)]
    );
    assert!(dirty_bits::run(&uri, "tuesday").is_err());
}

#[test]
fn read_disk_example_reads_over_several_connections() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let server = runtime.block_on(serve(directory.path()));
    let uri = server.addresses()[0].uri("disk").to_string();
    let arguments = [uri.as_str(), "2", "4", "65536"].map(ToOwned::to_owned);
    runtime.block_on(read_disk::run(arguments.into_iter())).unwrap();
    runtime.block_on(read_disk::run(std::iter::empty())).unwrap_err();
}
