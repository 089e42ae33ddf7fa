//! Several connections to one export (MULTI_CONN).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use nbd_proto::transmission::Command;
use nbd_proto::wire::TransmissionFlags;
use nbd_server::export::{Export, MemoryExport};

use crate::support::{Client, MODES, Script, Scripted, TestServer, disk_file, image_export};

#[test]
fn what_one_connection_wrote_every_other_reads() {
    let file = disk_file(&vec![0; 4 << 20]);
    let exports: [Arc<dyn Export>; 3] = [
        Arc::new(MemoryExport::new(4 << 20)),
        Scripted::new(4 << 20, Script::default()),
        Arc::new(image_export(file.path())),
    ];
    for export in exports {
        let server = TestServer::with(Default::default(), export);
        let mut clients = MODES.map(|mode| Client::connect(&server, mode));
        for round in 0..30_u8 {
            let writer = usize::from(round) % 3;
            // Lengths that take each way out: copied, gathered, from the file.
            for length in [100, 20_000, 200_000] {
                let data = vec![round + 1; length];
                assert_eq!(clients[writer].write(4096, &data), Ok(()));
                for client in &mut clients {
                    assert!(client.read(4096, length as u64) == data);
                }
            }
        }
        for client in &clients {
            assert!(client.negotiated.flags.contains(TransmissionFlags::CAN_MULTI_CONN));
        }
    }
}

#[test]
fn a_flush_on_one_connection_covers_the_writes_of_all() {
    let disk = Scripted::new(1 << 20, Script::default());
    let server = TestServer::with(Default::default(), disk.clone());
    let mut first = Client::connect(&server, MODES[2]);
    let mut second = Client::connect(&server, MODES[2]);
    assert_eq!(first.write(0, &[1; 512]), Ok(()));
    assert_eq!(second.request(0, 0, &Command::Flush).result, Ok(()));
    // One export object stands behind both, and it was flushed after the write had returned.
    assert_eq!(disk.writes.load(Ordering::SeqCst), 1);
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 1);
}
